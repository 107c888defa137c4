"""`python -m benchmarks.scaling`: requests per second against the number of replicas, one router process in front.

Replicas are scripted engines of known capacity, paced as an engine is by its steps, so that they cost next to nothing
and what could stop the line from being straight is the router: its choice of replicas and its own time. Each level is
saturated by clients that ask again as soon as they are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fastpath.rows import Row
from benchmarks.router.load import run_load
from benchmarks.router.servers import Server, free_port, run_server
from benchmarks.router.ways import CHAT
from serving.engine.scripted.app import ScriptedEngine
from serving.http.server import HttpServer
from serving.settings.stack import ScriptSettings

app = typer.Typer(add_completion=False)

LEVELS = (1, 2, 4, 8, 16)
SEQS, TOKENS, TOKENS_PER_S = 8, 25, 50.0
SCRIPT = ScriptSettings(tokens_per_s=TOKENS_PER_S, output_tokens=TOKENS, max_num_seqs=SEQS)
_ROUNDS_PER_LEVEL = 8
"""How often each place of an engine is filled: about as many half seconds."""
_GATEWAY = "benchmarks.router.gateway"


@app.command("engines", hidden=True)
def serve_engines(ports: Annotated[str, typer.Argument(help="Between commas.")]) -> None:
    """Serve scripted engines, all from one process, until killed."""
    uvloop.run(_serve([int(port) for port in ports.split(",")]))


async def _serve(ports: list[int]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    servers = [HttpServer(ScriptedEngine(SCRIPT, ["nano"]), host="127.0.0.1", port=port, drain_s=1) for port in ports]
    for server in servers:
        await server.start()
    await stop.wait()
    await asyncio.gather(*(server.stop() for server in servers))


@contextlib.contextmanager
def run_replicas(number: int) -> Iterator[Server]:
    """A router in front of so many engines."""
    ports = [free_port() for _ in range(number)]
    engines = [sys.executable, "-m", "benchmarks.scaling", "engines", ",".join(map(str, ports))]
    port = free_port()
    router = [sys.executable, "-m", _GATEWAY, "--port", str(port)]
    for engine in ports:
        router += ["--engine", f"http://127.0.0.1:{engine}"]
    with run_server(engines, ports[-1]), run_server(router, port) as server:
        yield server


def measure(number: int) -> dict[str, float]:
    """At one level."""
    places = number * SEQS
    with run_replicas(number) as router:
        run_load(router.url + CHAT, num_requests=places, concurrency=places, max_tokens=TOKENS)  # connections
        before_s = router.cpu_s()
        num_requests = places * _ROUNDS_PER_LEVEL
        load = run_load(router.url + CHAT, num_requests=num_requests, concurrency=places, max_tokens=TOKENS)
        router_s = router.cpu_s() - before_s
    return {
        "requests_per_s": num_requests / load.took_s,
        "chunks_per_s": load.chunks_per_s,
        "ideal_per_s": number * SEQS * TOKENS_PER_S / TOKENS,
        "router_cores": router_s / load.took_s,
    }


def build_rows(levels: dict[str, dict[str, float]]) -> list[Row]:
    """Each level beside what the engines could do at their best."""
    name = "requests/s through one router, scripted replicas: {}"
    peer = "what the engines can do"
    return [
        Row.of_rates(name.format(number), seen["requests_per_s"], seen["ideal_per_s"], peer, None, "per second")
        for number, seen in levels.items()
    ]


@app.command("run")
def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write rows and levels.")] = None,
) -> None:
    """Measure throughput against the number of replicas."""
    levels = {str(number): measure(number) for number in track(LEVELS, description="replicas")}
    table = Table("replicas", "requests/s", "ideal", "chunks/s", "router, cores", title="Scale with replicas, scripted")
    for number, seen in levels.items():
        rates = (f"{seen[key]:,.0f}" for key in ("requests_per_s", "ideal_per_s", "chunks_per_s"))
        table.add_row(number, *rates, f"{seen['router_cores']:.2f}")
    Console().print(table)
    if json_file is not None:
        rows = [dataclasses.asdict(row) for row in build_rows(levels)]
        json_file.write_text(json.dumps({"rows": rows, "levels": levels}) + "\n")


if __name__ == "__main__":
    app()
