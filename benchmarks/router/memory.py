"""Memory per open silent stream, at 2,000 of them: the router's growth, and the bare engine's for comparison."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.fastpath.rows import Row
from benchmarks.router.servers import Server
from benchmarks.router.ways import BARE, CHAT, OURS, run_ways, set_paces

NUM_STREAMS, NUM_WARM = 2000, 100


def run() -> Iterator[Row]:
    """Open the streams, look, close them."""
    with run_ways(OURS) as ways:
        set_paces(ways, 0.001)  # a first token, and then none for a quarter of an hour
        (router, _), (engine, _) = ways[OURS].parts
        with hold_streams(ways[OURS].url, NUM_WARM):
            pass  # what is only done once
        before = router.memory_bytes()
        engine_before = engine.memory_bytes()
        with hold_streams(ways[OURS].url, NUM_STREAMS):
            ours = _per_stream_kb(router, before)
            theirs = _per_stream_kb(engine, engine_before)
    name = f"memory per open silent stream, {NUM_STREAMS} of them"
    yield Row.of_costs(name, ours, theirs, f"{BARE} with the engine in it", None, "kB")


def _per_stream_kb(server: Server, before: int) -> float:
    return (server.memory_bytes() - before) / NUM_STREAMS / 1e3


@contextlib.contextmanager
def hold_streams(url: str, number: int) -> Iterator[None]:
    """So many streams with their first token, held open while the context lasts, by a process of its own.

    Raises:
        RuntimeError: not all of them could be opened.
    """
    command = [sys.executable, "-m", "benchmarks.router.hold", url + CHAT, str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "open":
            raise RuntimeError(f"{number} streams to {url} could not be opened")
        yield
        process.terminate()
