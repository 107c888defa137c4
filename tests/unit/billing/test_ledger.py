from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select
from support.billing_samples import make_record
from support.databases import MakeSettings
from support.paths import ROOT

from serving.billing.database import Database, ReplicaLife
from serving.billing.journal_frames import decode_frames
from serving.billing.ledger import Ledger
from serving.billing.periods import month_of
from serving.billing.prices import PriceBook
from serving.billing.schema import MONTHS, PRICES, REPLICAS, REQUESTS
from serving.billing.spool import Spool, open_spool, read_spools
from serving.errors import ServingError
from serving.settings.billing import BillingSettings, PriceSettings, SpoolSettings
from unit.billing.test_spool import die

NUM_KILLS = 20
PATIENCE_S = 30.0


async def read_ids(settings: BillingSettings) -> Counter[str]:
    database = Database(settings)
    async with database.reading() as connection:
        ids = Counter((await connection.execute(select(REQUESTS.c.request_id))).scalars())
    await database.close()
    return ids


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another process or has no event
            await asyncio.sleep(0.01)


async def test_what_is_recorded_is_in_the_database_soon(make_settings: MakeSettings) -> None:
    ledger = Ledger(make_settings(), "r1", PriceBook.from_settings({"nano": PriceSettings()}))
    await ledger.start()
    for number in range(1000):
        ledger.record(make_record(number))
    assert ledger.depth == 1000
    assert ledger.lag_s > 0
    assert await ledger.flush(PATIENCE_S)
    assert (ledger.depth, ledger.lag_s, ledger.size_bytes, ledger.is_alarming) == (0, 0.0, 0, False)
    assert ledger.is_database_up
    assert len(await read_ids(make_settings())) == 1000
    async with ledger.database.reading() as connection:
        assert (await connection.execute(select(func.count()).select_from(PRICES))).scalar() == 1
    await ledger.close()
    assert ledger.counts.num_committed == ledger.counts.num_recorded == 1000
    assert list((make_settings().directory / "spool").iterdir()) == []


async def test_a_few_records_do_not_wait_for_more(make_settings: MakeSettings) -> None:
    ledger = Ledger(make_settings(), "r1")
    await ledger.start()
    ledger.record(make_record(0))
    await wait_until(lambda: ledger.depth == 0)
    await ledger.close()


async def test_closing_brings_the_last_ones_home(make_settings: MakeSettings) -> None:
    ledger = Ledger(make_settings(flush_s=60), "r1")
    await ledger.start()
    ledger.record(make_record(0))
    await ledger.close()
    assert await read_ids(make_settings()) == {"req-0": 1}


async def test_the_same_request_twice_is_one_row(make_settings: MakeSettings) -> None:
    ledger = Ledger(make_settings(), "r1")
    await ledger.start()
    for number in (0, 0, 1):
        ledger.record(make_record(number))
    assert await ledger.flush(PATIENCE_S)
    assert (ledger.counts.num_committed, ledger.counts.num_repeated) == (2, 1)
    await ledger.close()


async def test_a_database_that_is_away_delays_nothing_and_loses_nothing(tmp_path: Path) -> None:
    away = BillingSettings(directory=tmp_path, database_url=SecretStr("postgresql://nobody@127.0.0.1:1/none"))
    ledger = Ledger(away, "r1")
    await ledger.start()
    begin_s = time.monotonic()
    for number in range(200):
        ledger.record(make_record(number))
    assert time.monotonic() - begin_s < 1.0
    await wait_until(lambda: ledger.counts.num_failures > 1)
    assert not ledger.is_database_up
    assert ledger.depth == 200
    assert ledger.lag_s > 0.1
    await ledger.close(timeout_s=0.05)
    here = BillingSettings(directory=tmp_path, spool=SpoolSettings(adopt_s=0.05))
    other = Ledger(here, "r2")
    await other.start()
    await wait_until(lambda: other.counts.num_committed == 200)
    await other.close()
    assert await read_ids(here) == {f"req-{number}": 1 for number in range(200)}


async def test_a_database_that_comes_back_gets_what_it_missed(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(make_settings(), "r1")
    await ledger.start()
    insert, failures = ledger.database.insert, iter([OSError("away"), TimeoutError(), None])

    async def fail_first(records: list[object]) -> int:
        num_new = await insert(records)  # type: ignore[arg-type]
        if (failure := next(failures, None)) is not None:
            raise failure  # committed, but the answer was lost
        return num_new

    monkeypatch.setattr(ledger.database, "insert", fail_first)
    for number in range(10):
        ledger.record(make_record(number))
    assert await ledger.flush(PATIENCE_S)
    assert ledger.counts.num_failures == 2
    assert ledger.counts.num_repeated == 10
    await ledger.close()
    assert await read_ids(make_settings()) == {f"req-{number}": 1 for number in range(10)}


async def test_a_slow_database_is_given_up_and_tried_again(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(make_settings(write_timeout_s=1), "r1")
    await ledger.start()
    await ledger.flush(PATIENCE_S)

    async def hang(_: object) -> int:
        await asyncio.sleep(3600)
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(ledger.database, "insert", hang)
        ledger.record(make_record(0))
        await wait_until(lambda: ledger.counts.num_failures > 0)
    assert await ledger.flush(PATIENCE_S)
    await ledger.close()


async def test_a_record_that_is_refused_does_not_hold_up_the_others(make_settings: MakeSettings) -> None:
    ledger = Ledger(make_settings(), "r1")
    await ledger.start()
    for number in range(10):
        ledger.record(make_record(number, tenant_id="a\0b\ud800" if number == 5 else "acme", num_pages=2**64 - 1))
    assert await ledger.flush(PATIENCE_S)
    await ledger.close()
    assert len(await read_ids(make_settings())) == 10
    assert ledger.counts.num_refused == 0


async def test_what_cannot_be_mended_is_put_aside(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings()
    ledger = Ledger(settings, "r1")
    await ledger.start()
    insert = ledger.database.insert

    async def refuse_one(records: list[object]) -> int:
        if any(record.request_id == "req-1" for record in records):  # type: ignore[attr-defined]
            raise OverflowError("no")
        return await insert(records)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger.database, "insert", refuse_one)
    for number in range(3):
        ledger.record(make_record(number))
    assert await ledger.flush(PATIENCE_S)
    await ledger.close()
    assert await read_ids(settings) == {"req-0": 1, "req-2": 1}
    assert ledger.counts.num_refused == 1
    kept = decode_frames((settings.directory / "refused").read_bytes(), limit=9, is_end=True)
    assert kept.records == [make_record(1)]


async def test_a_disk_that_is_full_is_bridged_by_memory(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(make_settings(), "r1")
    await ledger.start()
    await ledger.flush(PATIENCE_S)

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    ledger.record(make_record(0))
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", refuse)
        ledger.record(make_record(1))
    ledger.record(make_record(2))
    assert ledger.is_alarming
    assert await ledger.flush(PATIENCE_S)
    assert not ledger.is_alarming
    await ledger.close()
    assert len(await read_ids(make_settings())) == 3
    assert (ledger.counts.num_unspooled, ledger.counts.num_lost) == (1, 0)


def away(folder: Path, **spool: float) -> BillingSettings:
    """A database that cannot be reached, and journals of which ten records or so fill the room."""
    sizes = {"segment_bytes": 4096, "alarm_bytes": 4096, "max_bytes": 4096}
    return BillingSettings(
        directory=folder,
        database_url=SecretStr("postgresql://nobody@127.0.0.1:1/none"),
        spool=SpoolSettings.model_validate({**sizes, **spool}),
    )


def room(ledger: Ledger, tenant_id: str = "acme", *, is_one_of_many: bool = True) -> str:
    """What a tenant's next request would be refused with."""
    try:
        ledger.check_room(tenant_id, is_one_of_many=is_one_of_many)
    except ServingError as error:
        return f"{error.http_status} {error.code}"
    return ""


async def test_a_full_journal_refuses_requests_and_drops_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(away(tmp_path), "r1")
    await ledger.start()
    num_taken = 0
    while not room(ledger, is_one_of_many=False):
        ledger.record(make_record(num_taken))
        num_taken += 1
    assert 4 < num_taken < 100
    assert (room(ledger, is_one_of_many=False), ledger.used_ratio >= 1) == ("503 ledger_full", True)
    for number in range(num_taken, num_taken + 20):  # those that were under way
        ledger.record(make_record(number))
    assert (ledger.depth, ledger.counts.num_unspooled) == (num_taken + 20, 0)
    await wait_until(lambda: "the ledger is behind" in caplog.text)
    await ledger.close(timeout_s=0.05)
    assert ledger.counts.num_lost == 0
    # The next router counts what lies there, and brings it to the database when that is back.
    still = Ledger(away(tmp_path), "r2")
    await still.start()
    assert room(still) == "503 ledger_full"
    await still.close(timeout_s=0.05)
    begin_s = time.monotonic()
    passed_s = 0.0
    back = Ledger(BillingSettings(directory=tmp_path, flush_s=0.05), "r3", clock=lambda: begin_s + passed_s)
    await back.start()
    await wait_until(lambda: back.counts.num_committed == num_taken + 20)
    passed_s = 60.0
    await wait_until(lambda: back.used_ratio == 0.0)
    assert room(back) == ""
    await back.close()
    assert len(await read_ids(BillingSettings(directory=tmp_path))) == num_taken + 20


async def test_one_tenants_rows_leave_room_for_others(tmp_path: Path) -> None:
    ledger = Ledger(away(tmp_path), "r1")
    await ledger.start()
    num_taken = 0
    while not room(ledger):
        ledger.record(make_record(num_taken))
        num_taken += 1
    assert (room(ledger), room(ledger, "other")) == ("429 tenant_ledger_full", "")
    assert room(ledger, is_one_of_many=False) == "", "who is alone may fill it"
    assert 0.4 < ledger.used_ratio < 0.7
    await ledger.close(timeout_s=0.05)


async def test_a_disk_that_takes_nothing_refuses_requests_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the database away, too: what was under way stays in memory, and is written as soon as that goes."""
    settings = away(tmp_path, max_bytes=2**20)
    ledger = Ledger(settings, "r1")
    await ledger.start()

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", refuse)
        for number in range(3):
            ledger.record(make_record(number))
        assert (room(ledger), ledger.used_ratio, ledger.depth) == ("503 ledger_full", 1.0, 3)
        failures = ledger.counts.num_failures
        await wait_until(lambda: ledger.counts.num_failures >= failures + 2)  # it has tried the disk in between
        assert room(ledger) == "503 ledger_full"
    await wait_until(lambda: not room(ledger))
    assert (ledger.depth, ledger.is_alarming) == (3, False)
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(Spool, "append", refuse)
        ledger.record(make_record(3))
        await ledger.close(timeout_s=0.05)
    assert (ledger.counts.num_lost, "request_id='req-3'" in caplog.text) == (1, True)
    left = [record.request_id for records in read_spools(tmp_path / "spool", 9) for record in records]
    assert left == ["req-0", "req-1", "req-2"]


async def test_an_orphan_is_adopted_and_ones_own_are_not_kept_waiting(make_settings: MakeSettings) -> None:
    settings = make_settings(batch_rows=8)
    orphan = open_spool(settings.directory / "spool", "dead", settings.spool)
    for number in range(100):
        orphan.append(make_record(number))
    die(orphan)
    ledger = Ledger(settings, "r1")
    await ledger.start()
    for number in range(100, 130):
        ledger.record(make_record(number))
    await wait_until(lambda: ledger.counts.num_committed == 130)
    await ledger.close()
    assert len(await read_ids(settings)) == 130
    assert list((settings.directory / "spool").iterdir()) == []


async def test_budgets_learn_what_others_spent(make_settings: MakeSettings) -> None:
    settings = make_settings()
    first, second = Ledger(settings, "r1"), Ledger(settings, "r2")
    for ledger in (first, second):
        await ledger.start()
        for number in range(3):
            ledger.record(make_record(request_id=f"{ledger.router_id}-{number}", router_id=ledger.router_id))
        assert await ledger.flush(PATIENCE_S)
    month = month_of(make_record().arrived_ns)
    assert await first.read_month(month) == {"acme": 3 * 80_000}
    assert await first.read_month("1999-01") == {}
    for ledger in (first, second):
        await ledger.close()


async def test_replicas_lives_are_written_with_what_they_cost(make_settings: MakeSettings) -> None:
    ledger = Ledger(make_settings(replica_hour_dollars={"nano": "1.5"}), "r1")
    ledger.see_replicas([ReplicaLife("nano#1", "nano", 5, 10)])
    ledger.see_replicas([ReplicaLife("nano#1", "nano", 9, 20), ReplicaLife("large#1", "large", 1, 2)])
    await ledger.start()
    assert await ledger.flush(PATIENCE_S)
    found: list[tuple[object, ...]] = []
    while len(found) < 2:
        async with ledger.database.reading() as connection:
            found = [tuple(row) for row in await connection.execute(select(REPLICAS).order_by(REPLICAS.c.replica_id))]
    assert found == [("large#1", "large", 1, 2, 0), ("nano#1", "nano", 5, 20, 1_500_000_000)]
    await ledger.close()


async def test_a_ledger_that_was_not_started_can_be_closed(make_settings: MakeSettings) -> None:
    await Ledger(make_settings(), "r1").close()


async def test_a_router_killed_again_and_again_loses_and_doubles_nothing(
    make_settings: MakeSettings, database_url: str | None
) -> None:
    """Each life is killed with SIGKILL while it writes; the others adopt what it has left."""
    settings = make_settings()
    said = await asyncio.to_thread(run_writers, settings, database_url)
    last = Ledger(settings, "last")
    await last.start()
    await wait_until(lambda: last.is_database_up and not any((settings.directory / "spool").glob("router*")))
    async with last.database.reading() as connection:
        sums = select(func.sum(MONTHS.c.num_requests), func.sum(MONTHS.c.cost_nanodollars))
        num_requests, cost = (await connection.execute(sums)).one()
    await last.close()
    found = await read_ids(settings)
    # On a busy machine a life may be over before it has said anything.
    assert len({request_id.partition("-")[0] for request_id in said}) >= NUM_KILLS // 2
    assert not set(said) - found.keys()
    assert set(found.values()) == {1}
    # A record that was written when the process died before it could say so is right too: one per life at most.
    assert len(said) <= len(found) <= len(said) + NUM_KILLS
    assert (int(num_requests), int(cost)) == (len(found), len(found) * 80_000)


def run_writers(settings: BillingSettings, url: str | None) -> list[str]:
    """What they have said."""
    ended = subprocess.run(
        [sys.executable, "-m", "support.ledger_writer", settings.directory, url or "", str(NUM_KILLS)],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return ended.stdout.splitlines()
