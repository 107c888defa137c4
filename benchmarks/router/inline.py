"""Fast mode: what the router's checks add inside the engine's process, per streamed chunk, against it without them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.router.chunks import CONCURRENCY, MAX_TOKENS, NUM_REQUESTS, PACES
from benchmarks.router.servers import Server, free_port, run_server
from benchmarks.router.ways import BARE, HAPROXY, SCRIPT, Cost, Way, cheapest, measure, run_ways, set_paces

ROUNDS = 10
_INLINE = "router in the engine's process"


def run() -> Iterator[Row]:
    """The replica with and without, in turns; beside it what HAProxy in front of the one without adds."""
    with run_ways(HAPROXY) as ways:
        for name, pace in PACES.items():
            set_paces(ways, pace)
            with run_inline(pace) as server:
                sides = {**ways, _INLINE: Way(_INLINE, server.url, ((server, ()),))}
                rounds: dict[str, list[Cost]] = {side: [] for side in sides}
                for _ in range(rounds_of(ROUNDS)):
                    for side, way in sides.items():
                        load = {"num_requests": NUM_REQUESTS[name], "concurrency": CONCURRENCY}
                        rounds[side].append(measure(way, max_tokens=MAX_TOKENS, **load))
            costs = {side: cheapest(each).cpu_us_per_chunk for side, each in rounds.items()}
            ours, theirs = (max(0.0, costs[side] - costs[BARE]) for side in (_INLINE, HAPROXY))
            title = f"CPU that fast mode adds per chunk, c={CONCURRENCY}, {name}"
            yield Row.of_costs(title, ours, theirs, HAPROXY, None, "us")


def run_inline(tokens_per_s: float | None) -> contextlib.AbstractContextManager[Server]:
    """One replica in fast mode, without HAProxy in front."""
    port = free_port()
    script = SCRIPT.model_copy(update={"tokens_per_s": tokens_per_s}).model_dump_json()
    command = [sys.executable, "-m", "benchmarks.router.inline_server", "--port", str(port), "--script", script]
    return run_server(command, port)
