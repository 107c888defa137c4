"""`python -m benchmarks.load.clients`: what a streamed chunk costs the load generator, with Locust's two clients.

Both read the same streams of a scripted engine, one after the other on one connection, in a process of their own: the
one that the users of `locustfile.py` have (geventhttpclient, FastHttpUser's), and requests (HttpUser's) read line by
line. CPU time of the reading process alone.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.__main__ import build_table
from benchmarks.fastpath.rows import Row
from benchmarks.router.servers import run_engine

app = typer.Typer(add_completion=False)

NUM_REQUESTS, NUM_TOKENS, ROUNDS = 40, 256, 5
PACE = 1000.0
"""Tokens per second: every event comes alone, as it does from an engine."""


@app.command("read", hidden=True)
def read(client: str, url: str) -> None:
    """Read streams and print the CPU time per event in us."""
    from gevent import monkey

    monkey.patch_all()
    run = _read_fast if client == "fast" else _read_requests
    run(url, 2)
    began_s = time.process_time()
    num_events = run(url, NUM_REQUESTS)
    print((time.process_time() - began_s) / num_events * 1e6)


def _read_fast(url: str, number: int) -> int:
    from benchmarks.load.bodies import build_body
    from benchmarks.load.people import Manner, Step
    from benchmarks.load.visit import PagesClient

    client, step = PagesClient(url), Step(Manner.TEXT, 0, "Free OCR.", NUM_TOKENS, 0, 0.0)
    body = build_body("nano", step)
    return sum(len(client.ask(body, step).gaps_s) + 1 for _ in range(number))


def _read_requests(url: str, number: int) -> int:
    import requests

    from benchmarks.load.bodies import build_body
    from benchmarks.load.people import Manner, Step

    body = build_body("nano", Step(Manner.TEXT, 0, "Free OCR.", NUM_TOKENS, 0, 0.0))
    headers = {"content-type": "application/json"}
    num_events = 0
    with requests.Session() as session:
        for _ in range(number):
            with session.post(f"{url}/v1/chat/completions", body, headers=headers, stream=True, timeout=60) as answer:
                # A chunk size of None takes what has come, as the other client does.
                lines: Iterable[bytes] = answer.iter_lines(chunk_size=None, delimiter=b"\n\n")  # type: ignore[call-overload]
                for line in lines:
                    if line and not line.endswith(b"[DONE]"):
                        choices = orjson.loads(line.removeprefix(b"data: "))["choices"]
                        num_events += any(choice["delta"].get("content") for choice in choices)
    return num_events


@app.command("run")
def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the rows.")] = None,
) -> None:
    """Measure both clients in turns; the best of the rounds."""
    costs: dict[str, list[float]] = {"fast": [], "requests": []}
    with run_engine("--tokens-per-s", str(PACE), "--output-tokens", str(NUM_TOKENS)) as engine:
        for _ in range(rounds_of(ROUNDS)):
            for client, found in costs.items():
                command = [sys.executable, "-m", "benchmarks.load.clients", "read", client, engine.url]
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
                found.append(float(done.stdout))
    ours, theirs = (min(found) for found in costs.values())
    row = Row.of_costs("CPU of the load generator per chunk", ours, theirs, "requests (HttpUser)", None, "us")
    table = build_table([row])
    table.title = "The load generator"
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row)]) + "\n")


if __name__ == "__main__":
    app()
