from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from random import Random
from typing import Any

import pytest

from serving.billing.records import TokenCounts
from serving.cluster.directory import EMPTY, ReplicaRecord, ReplicaState, RouterReport, Snapshot
from serving.errors import (
    EngineError,
    InternalError,
    NoReplicaError,
    OverloadedError,
    ReplicaUnreachableError,
    ServingError,
)
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.circuit_breaker import BreakerState
from serving.router.scheduling.dispatcher import Dispatcher
from serving.router.scheduling.slot import Slot
from serving.router.scheduling.work_estimate import read_images
from serving.settings.router import AdmissionSettings, BreakerSettings, RouterSettings
from serving.settings.stack import EngineSettings, ModelSettings, Settings
from serving.settings.tenants import Identity, Priority, Tenant

CONFIG = (("base_size", 1024), ("image_size", 640), ("crop_mode", True))
LOST = ReplicaUnreachableError("gone")
USED = TokenCounts(num_prompt_tokens=10, num_completion_tokens=20)
BREAKER = BreakerSettings(failures=2, open_s=0.1, max_open_s=0.1)


def replica(name: str, state: ReplicaState = ReplicaState.READY, **more: Any) -> ReplicaRecord:
    fields: dict[str, Any] = {"max_num_seqs": 0, "capacity_tokens": 1000, "max_model_len": 8192}
    return ReplicaRecord(name, "nano", f"http://{name}", state, **{**fields, "image_config": CONFIG, **more})


def ask(work: int = 100, **more: Any) -> RoutedRequest:
    """A text request of so much work: one prompt token, and the rest of output."""
    return RoutedRequest("/v1/completions", "nano", b"", False, False, max_tokens=work - 1, **more)


def who(tenant: str = "t", priority: Priority = Priority.NORMAL) -> Identity:
    return Identity(tenant, Tenant(priority=priority))


class Stage:
    """A dispatcher, and the replica list that it reads."""

    def __init__(
        self,
        *records: ReplicaRecord,
        breaker: BreakerSettings | None = None,
        engine: EngineSettings | None = None,
        **admission: Any,
    ) -> None:
        values: dict[str, Any] = {"high_reserve": 0.0, "expected_output_tokens": 100_000} | admission
        router = RouterSettings(admission=AdmissionSettings(**values), breaker=breaker or BreakerSettings())
        self.snapshot = EMPTY
        self.settings = Settings(
            models={"nano": ModelSettings(checkpoint="nano")}, router=router, engine=engine or EngineSettings()
        )
        self.passed_s = 0.0
        """By which the dispatcher's clock is ahead."""
        self.dispatcher = Dispatcher(
            self.settings, lambda: self.snapshot, router_id="me", clock=self.now_s, rng=Random(1)
        )
        self.list(*records)

    def list(self, *records: ReplicaRecord) -> None:
        self.snapshot = Snapshot((1, self.snapshot.version[1] + 1), records)

    def now_s(self) -> float:
        return time.monotonic() + self.passed_s

    async def enter(self, work: int = 100, identity: Identity | None = None, patience_s: float = 60.0) -> Slot:
        return await self.enter_with(ask(work), identity, patience_s)

    async def enter_with(
        self, request: RoutedRequest, identity: Identity | None = None, patience_s: float = 60.0
    ) -> Slot:
        sample = self.dispatcher.sample(request.model)
        max_model_len = sample.max_model_len if sample is not None else 0
        work = self.dispatcher.estimate(request, read_images(request, sample), max_model_len)
        return await self.dispatcher.enter(request, work, identity or who(), deadline_s=self.now_s() + patience_s)

    def queue(self, work: int = 100, identity: Identity | None = None, patience_s: float = 60.0) -> asyncio.Task[Slot]:
        return asyncio.create_task(self.enter(work, identity, patience_s))

    def check_idle(self) -> None:
        assert self.dispatcher.is_idle
        assert self.dispatcher.queued_work() == {}
        assert self.dispatcher.replica_work() == {}
        assert set(self.dispatcher.queue_lengths().values()) == {0}
        assert self.dispatcher.num_timers == 0


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_request_that_fits_gets_a_place_at_once() -> None:
    stage = Stage(replica("a"))
    slot = await stage.enter(300)
    assert slot.replica.replica_id == "a"
    assert (slot.work.total, slot.num_tries, slot.waited_s) == (300, 1, 0)
    assert (slot.reading.modes, slot.reading.num_tokens) == ((), 0)
    assert stage.dispatcher.replica_work() == {"a": 300}
    assert not stage.dispatcher.is_idle
    slot.close(USED)
    slot.close(USED)
    stage.check_idle()


async def test_a_slot_says_how_its_replica_reads_the_images() -> None:
    stage = Stage(replica("a"))
    request = dataclasses.replace(ask(), image_sizes=((1654, 2339),), image_options={"mode": "base"})
    slot = await stage.enter_with(request)
    assert (slot.reading.modes, slot.reading.num_tokens) == (("base",), 273)
    assert slot.work.prompt_tokens == 274
    slot.close(None)


async def test_a_request_that_finds_room_is_placed_without_a_round_of_the_event_loop() -> None:
    stage = Stage(replica("a"))
    entering = stage.enter(1000)
    with pytest.raises(StopIteration) as placed:
        entering.send(None)
    slot = placed.value.value
    assert slot.work.total == 1000
    waiting = stage.enter(1)
    assert waiting.send(None) is not None, "this one sleeps on a future"
    with pytest.raises(asyncio.CancelledError):
        waiting.throw(asyncio.CancelledError)
    slot.close(USED)
    stage.check_idle()


async def test_work_beyond_the_capacity_waits_for_room() -> None:
    stage = Stage(replica("a"))
    first = await stage.enter(600)
    waiting = stage.queue(500)
    await settle()
    assert stage.dispatcher.queued_work() == {"nano": 500}
    assert stage.dispatcher.queue_lengths()["nano", Priority.NORMAL] == 1
    first.close(USED)
    second = await waiting
    assert second.waited_s > 0
    second.close(USED)
    stage.check_idle()


async def test_more_than_the_whole_capacity_runs_alone() -> None:
    stage = Stage(replica("a"))
    small = await stage.enter(1)
    large = stage.queue(5000)
    await settle()
    assert not large.done()
    small.close(USED)
    (await large).close(USED)
    stage.check_idle()


async def test_sequences_are_bounded_with_a_little_more_than_the_engine_runs() -> None:
    stage = Stage(replica("a", max_num_seqs=8, capacity_tokens=10**6))
    slots = [await stage.enter(10) for _ in range(9)]
    waiting = stage.queue(10)
    await settle()
    assert not waiting.done()
    slots.pop().close(USED)
    slots.append(await waiting)
    for slot in slots:
        slot.close(USED)
    stage.check_idle()


async def test_the_reserve_is_for_the_high_class_only() -> None:
    stage = Stage(replica("a"), high_reserve=0.2)
    common = await stage.enter(800)
    waiting = stage.queue(1)
    await settle()
    assert not waiting.done()
    vip = await stage.enter(200, who("vip", Priority.HIGH))  # passes who waits
    common.close(USED)
    (await waiting).close(USED)
    vip.close(USED)
    stage.check_idle()


async def test_the_higher_class_is_served_first() -> None:
    stage = Stage(replica("a"))
    running = await stage.enter(1000)
    order: list[Priority] = []

    async def run(priority: Priority) -> None:
        slot = await stage.enter(1000, who("t", priority))
        order.append(priority)
        slot.close(USED)

    tasks = [asyncio.create_task(run(priority)) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
    await settle()
    running.close(USED)
    await asyncio.gather(*tasks)
    assert order == [Priority.HIGH, Priority.NORMAL, Priority.LOW]
    stage.check_idle()


async def test_who_leaves_the_queue_lets_the_next_one_fit() -> None:
    stage = Stage(replica("a"))
    running = await stage.enter(600)
    large, small = stage.queue(1000), stage.queue(100)
    await settle()
    assert not small.done()
    large.cancel()
    (await small).close(USED)
    with pytest.raises(asyncio.CancelledError):
        await large
    running.close(USED)
    stage.check_idle()


async def test_a_client_that_leaves_in_the_moment_of_its_turn_gives_the_place_back() -> None:
    stage = Stage(replica("a"))
    running = await stage.enter(1000)
    first, second = stage.queue(1000), stage.queue(1000)
    await settle()
    running.close(USED)  # gives the place to the first, which has not run since
    first.cancel()
    (await second).close(USED)
    with pytest.raises(asyncio.CancelledError):
        await first
    stage.check_idle()


async def test_a_client_that_has_left_does_not_get_a_place() -> None:
    stage = Stage(replica("a"))
    running = await stage.enter(1000)
    first, second = stage.queue(1000), stage.queue(1000)
    await settle()
    first.cancel()
    running.close(USED)  # the first has not run since it was cancelled
    (await second).close(USED)
    with pytest.raises(asyncio.CancelledError):
        await first
    stage.check_idle()


async def test_a_deadline_that_passes_in_the_queue_is_told_in_time() -> None:
    stage = Stage(replica("a"))
    running = await stage.enter(1000)
    begin = time.monotonic()
    with pytest.raises(OverloadedError) as refused:
        await stage.enter(100, patience_s=0.1)
    assert 0.1 <= time.monotonic() - begin < 0.4  # 50 ms late at most, but for a busy machine
    assert refused.value.code == "deadline_unmeetable"
    running.close(USED)
    stage.check_idle()


async def test_a_deadline_that_has_passed_is_refused_though_there_is_room() -> None:
    stage = Stage(replica("a"))
    with pytest.raises(OverloadedError):
        await stage.enter(patience_s=-1.0)
    stage.check_idle()


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    stage = Stage(replica("a"))
    slot = await stage.enter(1000)
    stage.passed_s += 20.0
    slot.close(USED)
    running = await stage.enter(1000)
    waiting = stage.queue(1000, patience_s=100.0)
    await settle()
    with pytest.raises(OverloadedError) as refused:
        await stage.enter(1000, patience_s=50.0)
    assert refused.value.code == "deadline_unmeetable"
    assert 30 < refused.value.retry_after_s <= 60
    running.close(None)
    (await waiting).close(None)
    stage.check_idle()


async def test_who_can_no_longer_be_answered_in_time_gives_way_to_the_next() -> None:
    stage = Stage(replica("a"))
    running = await stage.enter(1000)
    hurried, patient = stage.queue(1000, patience_s=10.0), stage.queue(1000)
    await settle()
    stage.passed_s += 6.0  # so long do answers take, and 4 s are left
    running.close(USED)
    with pytest.raises(OverloadedError) as refused:
        await hurried
    assert refused.value.code == "deadline_unmeetable"
    (await patient).close(USED)
    stage.check_idle()


async def test_a_full_queue_refuses_at_once() -> None:
    stage = Stage(replica("a"), max_queue=1)
    running = await stage.enter(1000)
    waiting = stage.queue()
    await settle()
    with pytest.raises(OverloadedError) as refused:
        await stage.enter()
    assert refused.value.code == "overloaded"
    running.close(USED)
    (await waiting).close(USED)
    stage.check_idle()


async def test_a_full_queue_gives_way_to_another_tenant() -> None:
    stage = Stage(replica("a"), max_queue=2)
    running = await stage.enter(1000)
    flood = [stage.queue(100, who("flood")) for _ in range(2)]
    await settle()
    light = stage.queue(100, who("light"))
    await settle()
    with pytest.raises(OverloadedError):
        await flood[1]
    running.close(USED)
    for task in (flood[0], light):
        (await task).close(USED)
    stage.check_idle()


async def test_without_a_replica_requests_wait_for_one_to_come() -> None:
    stage = Stage()
    waiting = stage.queue()
    await settle()
    stage.list(replica("a"))
    stage.dispatcher.refresh()
    (await waiting).close(USED)
    stage.check_idle()


async def test_without_a_replica_requests_wait_so_long_and_no_longer() -> None:
    stage = Stage(replica("a", ReplicaState.DRAINING), replica("b", ReplicaState.STARTING), replica_wait_s=0.1)
    begin = time.monotonic()
    with pytest.raises(NoReplicaError):
        await stage.enter()
    assert 0.1 <= time.monotonic() - begin < 0.4
    stage.check_idle()


async def test_without_patience_for_replicas_nobody_waits() -> None:
    stage = Stage(replica_wait_s=0.0)
    with pytest.raises(NoReplicaError):
        await stage.enter()
    stage.check_idle()


async def test_the_wait_for_a_replica_counts_from_when_the_last_one_left() -> None:
    stage = Stage(replica("a"), replica_wait_s=0.2)
    running = await stage.enter(1000)
    waiting = stage.queue()
    await asyncio.sleep(0.25)
    assert not waiting.done()  # a full replica is a replica
    stage.list()
    stage.dispatcher.refresh()
    await asyncio.sleep(0.1)
    assert not waiting.done()
    with pytest.raises(NoReplicaError):
        await waiting
    running.close(None)
    stage.check_idle()


async def test_a_failed_request_moves_on_without_waiting_again() -> None:
    stage = Stage(replica("a"), replica("b"), replica("c"))
    slot = await stage.enter(600)
    waiting = [await stage.enter(900) for _ in range(2)]  # nobody has room for it now
    tried = [slot.replica.replica_id]
    assert slot.fail(LOST)
    tried.append(slot.replica.replica_id)
    assert slot.fail(LOST)
    tried.append(slot.replica.replica_id)
    assert sorted(tried) == ["a", "b", "c"]
    assert slot.num_tries == 3
    assert not slot.fail(LOST)
    for one in (slot, *waiting):
        one.close(None)
    assert not slot.fail(LOST)
    stage.check_idle()


async def test_a_single_replica_leaves_nobody_to_move_to() -> None:
    stage = Stage(replica("a"), replica("b", ReplicaState.DRAINING))
    slot = await stage.enter()
    assert not slot.fail(LOST)
    slot.close(None)
    stage.check_idle()


async def test_who_lost_the_only_replica_waits_for_its_successor() -> None:
    stage = Stage(replica("a"))
    slot = await stage.enter(600)
    assert not slot.fail(LOST)
    outliving = asyncio.create_task(slot.wait_for_replacement(LOST))
    newcomer = stage.queue(600)
    await settle()
    stage.list()
    stage.dispatcher.refresh()
    await settle()
    assert not outliving.done()
    stage.list(replica("b"))
    stage.dispatcher.refresh()
    assert await outliving
    assert (slot.replica.replica_id, slot.num_tries) == ("b", 2)
    assert stage.dispatcher.replica_work() == {"b": 600}
    await settle()
    assert not newcomer.done(), "it came later, and there is no room for both"
    stage.list(replica("b"), replica("c"))
    stage.dispatcher.refresh()
    await settle()
    assert (slot.replica.replica_id, slot.num_tries) == ("b", 2)
    slot.close(USED)
    (await newcomer).close(USED)
    stage.check_idle()


async def test_nobody_waits_for_the_successor_of_a_replica_that_outlives_its_lease() -> None:
    stage = Stage(replica("a"), engine=EngineSettings(heartbeat_s=0.05, lease_s=0.2))
    slot = await stage.enter()
    assert not slot.fail(LOST)
    async with asyncio.timeout(10):  # replica_wait_s is 30
        assert not await slot.wait_for_replacement(LOST)
    slot.close(None)
    stage.check_idle()


async def test_who_waits_for_a_successor_waits_for_a_breaker_too() -> None:
    stage = Stage(replica("a"), replica("b"), breaker=BREAKER)
    for _ in range(2):
        slots = [await stage.enter() for _ in range(2)]
        for slot in slots:
            slot.fail(LOST) if slot.replica.replica_id == "b" else slot.succeed()
            slot.close(None)
    slot = await stage.enter()
    assert slot.replica.replica_id == "a"
    assert not slot.fail(LOST)
    assert await slot.wait_for_replacement(LOST)
    assert slot.replica.replica_id == "b"
    slot.close(None)
    stage.check_idle()


async def test_the_wait_for_a_successor_ends() -> None:
    stage = Stage(replica("a"), replica_wait_s=0.05)
    slot = await stage.enter()
    assert not slot.fail(LOST)
    assert not await slot.wait_for_replacement(LOST)
    leaving = asyncio.create_task(slot.wait_for_replacement(LOST))
    await settle()
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    going_down = asyncio.create_task(slot.wait_for_replacement(LOST))
    await settle()
    stage.dispatcher.close()
    assert not await going_down
    slot.close(None)
    assert not await slot.wait_for_replacement(LOST)
    stage.check_idle()


async def test_only_the_lost_wait_for_a_successor_and_not_for_ever() -> None:
    stage = Stage(replica("a"))
    slot = await stage.enter()
    for error in (NoReplicaError("full"), InternalError("500")):
        assert not slot.fail(error)
        assert not await slot.wait_for_replacement(error)
    for name in ("b", "c"):
        stage.list(replica(name))
        assert slot.fail(LOST)
    assert not slot.fail(LOST)
    assert not await slot.wait_for_replacement(LOST), "three tries are enough"
    slot.close(None)
    stage.check_idle()


@pytest.mark.parametrize("error", [InternalError("500"), EngineError(400, "no", type="x", param=None, code=None)])
async def test_what_is_not_to_be_retried_does_not_move(error: ServingError) -> None:
    stage = Stage(replica("a"), replica("b"))
    slot = await stage.enter()
    assert not slot.fail(error)
    slot.close(None)
    stage.check_idle()


async def fail_twice(stage: Stage) -> None:
    for _ in range(2):
        slot = await stage.enter(patience_s=5)
        slot.fail(InternalError("500"))
        slot.close(None)


async def test_a_replica_that_fails_is_left_alone_and_then_probed() -> None:
    stage = Stage(replica("a"), breaker=BREAKER)
    await fail_twice(stage)
    assert stage.dispatcher.breaker_states() == {"a": BreakerState.OPEN}
    probe = await stage.enter()  # wakes by itself when the pause is over
    assert probe.waited_s >= 0.09
    waiting = stage.queue()
    await settle()
    assert not waiting.done()  # one probe at a time
    probe.succeed()
    probe.close(USED)
    (await waiting).close(USED)
    assert stage.dispatcher.breaker_states() == {"a": BreakerState.CLOSED}
    stage.check_idle()


async def test_a_probe_whose_client_left_frees_the_next_one() -> None:
    stage = Stage(replica("a"), breaker=BREAKER)
    await fail_twice(stage)
    probe, waiting = await stage.enter(), stage.queue()
    await settle()
    probe.close(None)
    (await waiting).close(None)
    assert stage.dispatcher.breaker_states() == {"a": BreakerState.HALF_OPEN}
    stage.check_idle()


async def test_an_engine_that_refuses_requests_is_well() -> None:
    stage = Stage(replica("a"), breaker=BREAKER)
    for error in (InternalError("500"), EngineError(400, "no", type="x", param=None, code=None)) * 5:
        slot = await stage.enter()
        slot.fail(error)
        slot.close(None)
    assert stage.dispatcher.breaker_states() == {"a": BreakerState.CLOSED}


async def test_a_replica_that_vanishes_is_forgotten_with_its_last_request() -> None:
    stage = Stage(replica("a"), replica("b"))
    slots = [await stage.enter(1000) for _ in range(2)]
    stage.list(replica("b"))
    waiting = stage.queue(1000)
    await settle()
    assert stage.dispatcher.replica_work() == {"a": 1000, "b": 1000}
    on_a = next(slot for slot in slots if slot.replica.replica_id == "a")
    assert on_a.fail(LOST)
    assert on_a.replica.replica_id == "b"
    assert stage.dispatcher.replica_work() == {"b": 2000}
    assert stage.dispatcher.breaker_states() == {"b": BreakerState.CLOSED}
    for slot in slots:
        slot.close(USED)
    (await waiting).close(USED)
    stage.check_idle()
    assert stage.dispatcher.num_replicas == 1


async def test_a_replica_that_comes_back_is_not_taken_for_idle() -> None:
    stage = Stage(replica("a"))
    slot = await stage.enter(1000)
    for records in ((), (replica("a"),)):
        stage.list(*records)
        stage.dispatcher.refresh()
    waiting = stage.queue(1)
    await settle()
    assert not waiting.done()
    slot.close(USED)
    (await waiting).close(USED)
    stage.check_idle()


def report(router_id: str, **work: int) -> RouterReport:
    return RouterReport(router_id, replica_work=tuple(work.items()))


async def test_what_other_routers_have_under_way_counts() -> None:
    stage = Stage(replica("a"), replica("b"))
    stage.dispatcher.refresh()
    stage.dispatcher.absorb((report("other", a=900), report("me", b=10**6)))
    slots = [await stage.enter(100) for _ in range(8)]
    assert {slot.replica.replica_id for slot in slots} == {"b"}
    stage.dispatcher.absorb((report("other", b=900),))
    slots.append(await stage.enter(100))
    assert slots[-1].replica.replica_id == "a"
    for slot in slots:
        slot.close(USED)
    stage.check_idle()


async def test_a_router_gets_its_share_of_a_replica_that_others_fill() -> None:
    stage = Stage(replica("a"))
    stage.dispatcher.absorb((report("other", a=1000),))
    slots = [await stage.enter(100) for _ in range(5)]  # half of it, for two routers
    waiting = stage.queue(100)
    await settle()
    assert not waiting.done()
    stage.dispatcher.absorb((report("other", a=400),))
    slots.append(await waiting)
    for slot in slots:
        slot.close(USED)
    stage.check_idle()


async def test_a_router_that_closes_lets_nobody_wait() -> None:
    stage = Stage()
    waiting = stage.queue()
    await settle()
    stage.dispatcher.close()
    with pytest.raises(OverloadedError):
        await waiting
    stage.check_idle()


async def test_the_forecast_follows_whole_answers_only() -> None:
    stage = Stage(replica("a", capacity_tokens=10**6), expected_output_tokens=500)
    request = RoutedRequest("/v1/completions", "nano", b"", False, False)
    for is_whole in (False, True):
        for _ in range(100):
            slot = await stage.enter_with(request)
            slot.close(USED, is_whole=is_whole)
        assert slot.work.output_tokens == (500 if not is_whole else pytest.approx(20, abs=5))
    stage.check_idle()


@pytest.mark.parametrize("num_replicas", [1, 3, 12])
async def test_nothing_is_left_of_ten_thousand_random_operations(num_replicas: int) -> None:
    rng = Random(num_replicas)
    stage = Stage(breaker=BreakerSettings(failures=2, open_s=0.001, max_open_s=0.01), max_queue=20, high_reserve=0.1)
    names = [f"r{i}" for i in range(num_replicas)]
    tasks: list[asyncio.Task[Slot]] = []
    slots: list[Slot] = []

    def shuffle() -> None:
        states = [ReplicaState.READY] * 8 + [ReplicaState.DRAINING, ReplicaState.STARTING]
        stage.list(*(replica(name, rng.choice(states), max_num_seqs=6) for name in names if rng.random() < 0.9))
        stage.dispatcher.refresh()

    def start() -> None:
        identity = who(rng.choice("abc"), rng.choice(list(Priority)))
        work = rng.choice([2, 50, 200, 900, 2000])
        tasks.append(stage.queue(work, identity, rng.choice([-1.0, 0.001, 0.01, 5.0])))

    def end() -> None:
        if slots:
            slot = slots.pop(rng.randrange(len(slots)))
            while rng.random() < 0.3 and slot.fail(LOST):
                pass
            if rng.random() < 0.5:
                slot.succeed()
            slot.close(rng.choice([None, USED]), is_whole=rng.random() < 0.5)

    def collect() -> None:
        for task in [task for task in tasks if task.done()]:
            tasks.remove(task)
            with contextlib.suppress(asyncio.CancelledError, OverloadedError, NoReplicaError):
                slots.append(task.result())

    def leave() -> None:
        if tasks:
            rng.choice(tasks).cancel()

    def hear() -> None:
        stage.dispatcher.absorb((report("other", **{name: rng.randrange(1000) for name in names}),))

    operations = [start] * 8 + [end] * 6 + [collect] * 6 + [leave] * 2 + [hear, shuffle, stage.dispatcher.tick]
    for _ in range(10_000):
        rng.choice(operations)()
        if rng.random() < 0.3:
            await asyncio.sleep(0)
        work = stage.dispatcher.replica_work()
        assert all(amount > 0 for amount in work.values())
    for _ in range(1000):
        collect()
        while slots:
            end()
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
    stage.check_idle()
