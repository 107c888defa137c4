"""`python -m benchmarks.ledger`: what a request costs that is put into the books, beside a transaction for each.

Costs are CPU time of the whole process: the request's place among those that are open, its record's way into the spool,
its share of a batch, fsync and all threads. A load of so many requests a second comes in small groups, as it does in a
router; what the same load costs without any ledger is taken off.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr
from rich.console import Console

from benchmarks.fastpath.__main__ import build_table
from benchmarks.fastpath.rows import Row
from serving.billing.database import Database
from serving.billing.journal_frames import encode_frame
from serving.billing.ledger import Ledger
from serving.billing.open_requests import OpenRequest
from serving.billing.records import Outcome, RequestRecord, TokenCounts
from serving.settings.billing import BillingSettings

_PEER = "a transaction per request"
_PAUSE_S = 0.01
_PEER_REQUESTS = 500

app = typer.Typer(add_completion=False)


@app.command()
def main(
    num_requests: Annotated[int, typer.Option("--requests", help="How many are put into the books.")] = 20_000,
    rates: Annotated[str, typer.Option(help="Requests per second, several between commas.")] = "500,4000",
    database_url: Annotated[
        str | None, typer.Option(help="An empty PostgreSQL database to measure as well as SQLite.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the rows.")] = None,
) -> None:
    """Measure the ledger's CPU time per request."""
    rows = [_measure_record(num_requests)]
    for url in (None, database_url) if database_url else (None,):
        rows += asyncio.run(_measure_ledger(url, [int(rate) for rate in rates.split(",")], num_requests))
    table = build_table(rows)
    table.title = "The ledger, CPU time per request"
    Console().print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def make_record(number: int) -> RequestRecord:
    """A usual one: an image, an answer, every field set."""
    now_ns = time.time_ns()
    return RequestRecord(
        request_id=f"req-{os.getpid()}-{now_ns}-{number}",
        tenant_id="acme",
        key_id="key-5f3a91c2",
        model="deepseek-ocr",
        route="/v1/chat/completions",
        outcome=Outcome.COMPLETED,
        status=200,
        modes=("gundam",),
        num_pages=1,
        tokens=TokenCounts(1100, 900, 0, 500),
        cost_nanodollars=83_000,
        price_version="base-12345678",
        replica_id="deepseek-ocr#abcdef",
        num_tries=1,
        finish_reason="stop",
        arrived_ns=now_ns,
        first_byte_ns=now_ns,
        ended_ns=now_ns,
        router_id="router-1",
    )


async def _load(num_requests: int, rate: int, take: Callable[[RequestRecord], object]) -> float:
    """CPU seconds of so many requests in groups at a rate."""
    group = max(1, round(rate * _PAUSE_S))
    begin_s, number = time.process_time(), 0
    due_s = time.monotonic()
    while number < num_requests:
        for _ in range(min(group, num_requests - number)):
            take(make_record(number))
            number += 1
        due_s += group / rate
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    return time.process_time() - begin_s


async def _measure_ledger(url: str | None, rates: list[int], num_requests: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        settings = BillingSettings(directory=directory, database_url=SecretStr(url) if url else None)
        ledger = Ledger(settings, "router-1")
        await ledger.start()
        if not await ledger.flush(30):
            raise typer.BadParameter("the database cannot be used")
        peer = await _measure_peer(ledger.database)
        rows = []
        for rate in rates:
            count = min(num_requests, 10 * rate)
            bare_s = await _load(count, rate, lambda _: None)
            ours_s = await _load(count, rate, lambda record: _keep(ledger, record))
            ours_s += await _cpu_of(lambda: ledger.flush(60))
            name = "PostgreSQL" if url else "SQLite"
            ours = max(0.0, ours_s - bare_s) / count * 1e6
            rows.append(
                Row.of_costs(f"{name}, {rate} requests/s", ours, peer, _PEER, _measure_floor(directory), "us of CPU")
            )
        await ledger.close()
    return rows


def _keep(ledger: Ledger, record: RequestRecord) -> None:
    """All that a request costs: its place among the open ones before a replica gets it, and its record."""
    ledger.open(
        OpenRequest(
            request_id=record.request_id,
            tenant_id=record.tenant_id,
            key_id=record.key_id,
            model=record.model,
            route=record.route,
            price_version=record.price_version,
            router_id=record.router_id,
            arrived_ns=record.arrived_ns,
            num_pages=record.num_pages,
            priority=record.priority,
            is_stream=record.is_stream,
            num_tries=1,
            replica_ids=(record.replica_id,),
        )
    )
    ledger.record(record)


async def _measure_peer(database: Database) -> float:
    """The plain way: every request is a transaction of its own, awaited."""

    async def work() -> None:
        for number in range(_PEER_REQUESTS):
            await database.insert([make_record(number)])

    return await _cpu_of(work) / _PEER_REQUESTS * 1e6


async def _cpu_of(work: Callable[[], Awaitable[object]]) -> float:
    begin_s = time.process_time()
    await work()
    return time.process_time() - begin_s


def _measure_record(num_requests: int) -> Row:
    """What the request itself waits for."""

    async def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(BillingSettings(directory=Path(folder), flush_s=60, batch_rows=512), "router-1")
            await ledger.start()
            await asyncio.sleep(0.5)
            records = [make_record(number) for number in range(num_requests)]
            begin_s = time.process_time()
            for record in records:
                ledger.record(record)
            ours = (time.process_time() - begin_s) / num_requests * 1e6
            await ledger.close(30)
            return ours

    with tempfile.TemporaryDirectory() as folder:
        floor = _measure_floor(Path(folder))
    ours = asyncio.run(run())
    return Row.of_costs(
        "record(), until it survives the process", ours, _measure_fsync(), "write and fsync", floor, "us of CPU"
    )


def _measure_floor(directory: Path, count: int = 10_000) -> float:
    """A bare `write` of the same bytes."""
    frame = encode_frame(make_record(0))
    fd = os.open(directory / "floor", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begin_s = time.process_time()
    for _ in range(count):
        os.write(fd, frame)
    floor = (time.process_time() - begin_s) / count * 1e6
    os.close(fd)
    return floor


def _measure_fsync(count: int = 200) -> float:
    """The plain way to make a record last: `write` and `fsync` for each."""
    with tempfile.TemporaryDirectory() as folder:
        fd = os.open(Path(folder) / "plain", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        begin_s = time.process_time()
        for number in range(count):
            os.write(fd, encode_frame(make_record(number)))
            os.fsync(fd)
        cost = (time.process_time() - begin_s) / count * 1e6
        os.close(fd)
    return cost


if __name__ == "__main__":
    app()
