from __future__ import annotations

import asyncio
import dataclasses
import time

from serving.cluster.directory import EMPTY, ReplicaRecord, ReplicaState, RouterReport
from serving.cluster.directory_actor import ReplicaDirectory

READY = ReplicaRecord("a", "nano", "http://127.0.0.1:1", ReplicaState.READY)
OTHER = dataclasses.replace(READY, replica_id="b")


async def test_a_reader_with_an_old_list_gets_the_new_one_at_once() -> None:
    directory = ReplicaDirectory(lease_s=60)
    await directory.put(READY)
    async with asyncio.timeout(1):
        assert (await directory.watch(EMPTY.version, 60)).records == (READY,)


async def test_a_reader_with_the_present_list_waits_for_its_timeout() -> None:
    directory = ReplicaDirectory(lease_s=60)
    await directory.put(READY)
    seen = await directory.watch(EMPTY.version, 0)
    started_s = time.monotonic()
    assert await directory.watch(seen.version, 0.1) == seen
    assert time.monotonic() - started_s >= 0.09
    async with asyncio.timeout(1):
        assert await directory.watch(seen.version, 0) == seen


async def test_every_waiting_reader_hears_of_a_change() -> None:
    directory = ReplicaDirectory(lease_s=60)
    await directory.put(READY)
    seen = await directory.watch(EMPTY.version, 0)
    readers = [asyncio.create_task(directory.watch(seen.version, 60)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(reader.done() for reader in readers)
    await directory.put(OTHER)
    async with asyncio.timeout(1):
        assert [(await reader).records for reader in readers] == [(READY, OTHER)] * 3


async def test_a_reader_follows_one_change_after_another() -> None:
    directory = ReplicaDirectory(lease_s=60)
    snapshot = await directory.watch(EMPTY.version, 0)
    for state in ReplicaState:
        waiting = asyncio.create_task(directory.watch(snapshot.version, 60))
        await asyncio.sleep(0)
        await directory.put(dataclasses.replace(READY, state=state))
        async with asyncio.timeout(1):
            snapshot = await waiting
        assert snapshot.records[0].state is state
    waiting = asyncio.create_task(directory.watch(snapshot.version, 60))
    await asyncio.sleep(0)
    await directory.remove("a")
    async with asyncio.timeout(1):
        assert (await waiting).records == ()


async def test_a_heartbeat_without_news_wakes_nobody() -> None:
    directory = ReplicaDirectory(lease_s=60)
    await directory.put(READY)
    seen = await directory.watch(EMPTY.version, 0)
    reader = asyncio.create_task(directory.watch(seen.version, 0.1))
    await asyncio.sleep(0.01)
    await directory.put(READY)
    await directory.remove("unknown")
    await asyncio.sleep(0.02)
    assert not reader.done()
    assert await reader == seen


async def test_a_replica_that_falls_silent_is_dropped_and_readers_hear_of_it() -> None:
    directory = ReplicaDirectory(lease_s=0.1)
    await directory.put(READY)
    await directory.put(dataclasses.replace(OTHER, state=ReplicaState.STARTING))
    seen = await directory.watch(EMPTY.version, 0)
    async with asyncio.timeout(1):
        later = await directory.watch(seen.version, 60)
    assert [record.replica_id for record in later.records] == ["b"], "who starts may be silent for longer"


async def test_a_replica_that_keeps_talking_stays() -> None:
    directory = ReplicaDirectory(lease_s=0.3)
    for _ in range(10):
        await directory.put(READY)
        await asyncio.sleep(0.05)
    assert (await directory.watch(EMPTY.version, 0)).records == (READY,)


async def test_a_restarted_directory_never_looks_like_the_one_before() -> None:
    first, second = ReplicaDirectory(lease_s=60), ReplicaDirectory(lease_s=60)
    await first.put(READY)
    await second.put(OTHER)
    seen = await first.watch(EMPTY.version, 0)
    async with asyncio.timeout(1):
        assert (await second.watch(seen.version, 60)).records == (OTHER,)


async def test_a_replica_waits_until_every_named_reader_goes_by_the_present_list() -> None:
    directory = ReplicaDirectory(lease_s=60)
    assert await directory.settle(0), "nobody reads"
    await directory.put(READY)
    seen = await directory.watch(EMPTY.version, 0)
    readers = {name: asyncio.create_task(directory.watch(seen.version, 60, name)) for name in ("r1", "r2")}
    unnamed = asyncio.create_task(directory.watch(seen.version, 60))
    await asyncio.sleep(0.01)
    assert await directory.settle(0)
    await directory.put(dataclasses.replace(READY, state=ReplicaState.DRAINING))
    settling = asyncio.create_task(directory.settle(60))
    for name, reader in readers.items():
        await asyncio.sleep(0.01)
        assert not settling.done(), "hearing of it is not going by it"
        present = await reader
        readers[name] = asyncio.create_task(directory.watch(present.version, 60, name))
    async with asyncio.timeout(1):
        assert await settling
    for waiting in (*readers.values(), unnamed):
        waiting.cancel()


async def test_a_reader_that_hangs_is_not_waited_for_longer_than_told() -> None:
    directory = ReplicaDirectory(lease_s=60)
    await directory.watch(EMPTY.version, 0, "r1")
    await directory.put(READY)
    started_s = time.monotonic()
    assert not await directory.settle(0.1)
    assert 0.09 <= time.monotonic() - started_s < 5


async def test_a_reader_that_has_left_or_is_long_silent_is_not_waited_for() -> None:
    directory = ReplicaDirectory(lease_s=0.1)
    for name in ("leaves", "silent"):
        await directory.watch(EMPTY.version, 0, name)
    await directory.put(READY)
    settling = asyncio.create_task(directory.settle(60))
    await asyncio.sleep(0.15)
    assert not settling.done()
    async with asyncio.timeout(1):
        await directory.leave("leaves")
        assert await settling


async def test_a_survey_shows_replicas_and_the_work_of_routers() -> None:
    directory = ReplicaDirectory(lease_s=60)
    await directory.put(READY)
    report = RouterReport("r", (("nano", 5),))
    assert await directory.exchange(report) == ()
    snapshot, reports = await directory.survey()
    assert (snapshot.records, reports) == ((READY,), (report,))
    assert await directory.reports() == (report,)
