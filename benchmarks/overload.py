"""`python -m benchmarks.overload`: four times more than the replicas can take, and what becomes of each class.

A router and two scripted engines of known capacity. First the high class alone, then as much as the replicas take, then
four times that for a minute, most of it from tenants of the normal and low classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.fastpath.rows import Row
from serving.cluster.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.engine.scripted.app import ScriptedEngine
from serving.http.server import HttpServer
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.router.app import RouterApp
from serving.settings.router import AdmissionSettings, RouterSettings
from serving.settings.stack import ModelSettings, ScriptSettings, Settings
from serving.settings.tenants import Priority, Tenant

app = typer.Typer(add_completion=False)

_NUM_REPLICAS = 2
_SEQS = 8
_TOKENS = 25
_SCRIPT = ScriptSettings(tokens_per_s=50, output_tokens=_TOKENS, max_num_seqs=_SEQS, kv_tokens=100_000)
_HIGH_PER_S = 2.0
_OVERLOAD = 4.0
_DEADLINE_MS = 5000


@dataclass
class Seen:
    """What the clients of one class saw."""

    completed: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """By status and code; only 429 and 503 with Retry-After count as such."""
    failures: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def p95_s(self) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else float("nan")


class Clients:
    """Asks with a key of each class."""

    def __init__(self, url: str, keys: dict[Priority, str], session: aiohttp.ClientSession) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._keys = keys
        self._session = session
        self.seen = {priority: Seen() for priority in Priority}

    async def ask(self, priority: Priority) -> None:
        headers = {"authorization": f"Bearer {self._keys[priority]}", "x-request-timeout-ms": str(_DEADLINE_MS)}
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": _TOKENS}
        seen = self.seen[priority]
        began_s = time.monotonic()
        try:
            async with self._session.post(self._url, json=body, headers=headers) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            seen.failures.append(repr(error))
            return
        if answer.status == 200:
            seen.completed += 1
            seen.latencies_s.append(time.monotonic() - began_s)
        elif answer.status in (429, 503) and "retry-after" in answer.headers:
            seen.refusals[f"{answer.status} {json.loads(text)['error']['code']}"] += 1
        else:
            seen.failures.append(f"{answer.status} {text[:200]}")

    async def repeat(self, priority: Priority, until_s: float) -> None:
        """One after the other."""
        while time.monotonic() < until_s:
            await self.ask(priority)

    async def offer(self, priority: Priority, per_s: float, until_s: float) -> None:
        """At a constant rate, whatever becomes of those before."""
        async with asyncio.TaskGroup() as group:
            due_s = time.monotonic()
            while due_s < until_s:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                group.create_task(self.ask(priority))
                due_s += 1 / per_s


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[str, dict[Priority, str]]]:
    """The router's address and a key of each class."""
    made = {priority: make_key(priority, created=datetime.now(UTC)) for priority in Priority}
    keys = folder / "keys.yaml"
    tenants = {str(priority): Tenant(priority=priority) for priority in Priority}
    write_keys(keys, KeysFile(tenants=tenants, keys=tuple(record for _, record in made.values())))
    settings = Settings(
        models={"m": ModelSettings(checkpoint="scripted", script=_SCRIPT)},
        router=RouterSettings(keys_file=keys, admission=AdmissionSettings(max_queue=64)),
    )
    async with contextlib.AsyncExitStack() as stack:
        records = []
        for number in range(_NUM_REPLICAS):
            engine = HttpServer(ScriptedEngine(_SCRIPT, ("m",)), host="127.0.0.1", port=0, drain_s=1)
            await engine.start()
            stack.push_async_callback(engine.stop)
            url = f"http://127.0.0.1:{engine.port}"
            records.append(
                ReplicaRecord(
                    str(number),
                    "m",
                    url,
                    ReplicaState.READY,
                    max_num_seqs=_SEQS,
                    capacity_tokens=_SCRIPT.kv_tokens,
                    max_model_len=8192,
                )
            )
        snapshot = Snapshot((1, 1), tuple(records))
        router = RouterApp(settings, lambda: snapshot)
        server = HttpServer(router, host="127.0.0.1", port=0, drain_s=1, limits=settings.router.limits)
        await router.start()
        await server.start()
        stack.push_async_callback(router.close)
        stack.push_async_callback(server.stop)
        yield f"http://127.0.0.1:{server.port}", {priority: text for priority, (text, _) in made.items()}


@dataclass
class Result:
    """The figures; rates in requests per second, latencies in seconds."""

    saturated_per_s: float
    offered_per_s: float
    completed_per_s: float
    high_unloaded_p95_s: float
    high_p95_s: float
    high_completed: int
    high_refused: int
    completed: dict[str, int]
    refused: dict[str, dict[str, int]]
    failures: int

    @property
    def is_good(self) -> bool:
        """Nothing but documented refusals, little work lost, and the high class hardly touched."""
        kept = self.completed_per_s >= 0.95 * self.saturated_per_s
        return kept and not self.failures and self.high_p95_s <= 2 * self.high_unloaded_p95_s


async def measure(seconds: float) -> Result:
    """The three phases, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder)) as (url, keys):
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(30)) as session:
                alone = Clients(url, keys, session)
                await alone.offer(Priority.HIGH, _HIGH_PER_S, time.monotonic() + seconds / 4)
                full = Clients(url, keys, session)
                began_s = time.monotonic()
                num_clients = _NUM_REPLICAS * (_SEQS + 2)
                await asyncio.gather(*(full.repeat(Priority.NORMAL, began_s + seconds / 2) for _ in range(num_clients)))
                saturated = full.seen[Priority.NORMAL].completed / (time.monotonic() - began_s)
                return await _overload(Clients(url, keys, session), alone, saturated, seconds)


async def _overload(clients: Clients, alone: Clients, saturated: float, seconds: float) -> Result:
    began_s = time.monotonic()
    until_s = began_s + seconds
    rest = _OVERLOAD * saturated - _HIGH_PER_S
    await asyncio.gather(
        clients.offer(Priority.HIGH, _HIGH_PER_S, until_s),
        clients.offer(Priority.NORMAL, rest / 2, until_s),
        clients.offer(Priority.LOW, rest / 2, until_s),
    )
    took_s = time.monotonic() - began_s
    seen = clients.seen
    high = seen[Priority.HIGH]
    return Result(
        saturated_per_s=saturated,
        offered_per_s=_OVERLOAD * saturated,
        completed_per_s=sum(each.completed for each in seen.values()) / took_s,
        high_unloaded_p95_s=alone.seen[Priority.HIGH].p95_s,
        high_p95_s=high.p95_s,
        high_completed=high.completed,
        high_refused=sum(high.refusals.values()),
        completed={str(priority): each.completed for priority, each in seen.items()},
        refused={str(priority): dict(each.refusals) for priority, each in seen.items()},
        failures=sum(len(each.failures) for each in (*seen.values(), *alone.seen.values())),
    )


def build_rows(result: Result) -> list[Row]:
    """What is kept of the work, and of the high class's time."""
    completed = (result.completed_per_s, result.saturated_per_s)
    p95 = (result.high_p95_s, result.high_unloaded_p95_s)
    return [
        Row.of_rates("completed under overload", *completed, "completed at saturation", None, "requests/s"),
        Row.of_costs("p95 of the high class under overload", *p95, "alone", None, "s"),
    ]


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=4, help="Length of the overload.")] = 60.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Exit status 1 when work was lost, a refusal was not one, or the high class suffered."""
    result = uvloop.run(measure(seconds))
    table = Table("figure", "value", title=f"{_OVERLOAD:g} times overload for {seconds:g} s")
    for name, value in asdict(result).items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if json_file is not None:
        rows = [asdict(row) for row in build_rows(result)]
        json_file.write_text(json.dumps({"rows": rows, **asdict(result)}, indent=2) + "\n")
    raise typer.Exit(0 if result.is_good else 1)


if __name__ == "__main__":
    app()
