"""Turns between tenants: who is next, for any tenants, orders and costs; and the queue that waits for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serving.ocr.limits.turns import TurnQueue, Turns

TENANTS = st.sampled_from(["a", "b", "c", "d"])


@dataclass(eq=False)
class Waiting:
    """An order, and how many of each other tenant's were begun since it was the next one of its tenant."""

    tenant: str
    begun_before: Counter[str] = field(default_factory=Counter)


@given(
    ops=st.lists(st.one_of(st.tuples(st.just("add"), TENANTS), st.tuples(st.just("take"), st.just(""))), max_size=200)
)
def test_nobody_waits_for_more_than_one_order_of_each_other_tenant(ops: list[tuple[str, str]]) -> None:
    turns: Turns[Waiting] = Turns(60.0)
    waiting: dict[str, list[Waiting]] = {}
    for op, tenant in ops:
        if op == "add":
            order = Waiting(tenant)
            waiting.setdefault(tenant, []).append(order)
            turns.add(tenant, order)
            continue
        taken = turns.take(0.0)
        assert (taken is None) == (not any(waiting.values())), "somebody waits while a place is free"
        if taken is None:
            continue
        assert waiting[taken.tenant].pop(0) is taken, "a tenant's own orders keep their order"
        for orders in waiting.values():
            if orders and orders[0].tenant != taken.tenant:
                orders[0].begun_before[taken.tenant] += 1
                assert orders[0].begun_before[taken.tenant] <= 1
    assert len(turns) == sum(map(len, waiting.values()))


@given(costs=st.lists(st.floats(0.0, 50.0), min_size=1, max_size=30), cheap=st.floats(0.0, 0.01))
def test_a_tenant_that_has_used_more_waits_behind_the_others_but_not_for_ever(costs: list[float], cheap: float) -> None:
    turns: Turns[str] = Turns(60.0)
    for cost in costs:
        turns.charge("hostile", cost, 0.0)
    turns.add("hostile", "hostile")
    is_over = sum(costs) >= 60.0
    now_s, num_before = 0.0, 0
    turns.add("other", "other")
    while turns.take(now_s) != "hostile":
        num_before += 1
        now_s += 0.5
        turns.charge("other", cheap, now_s)
        turns.add("other", "other")
    assert num_before == 0 or is_over
    # A debt is a minute's worth at most, and is paid off by waiting.
    assert now_s <= 61.0


def test_a_full_allowance_is_a_minutes_worth_and_no_more() -> None:
    turns: Turns[str] = Turns(60.0)
    turns.charge("a", 59.0, 0.0)
    assert turns.has_allowance("a", 0.0)
    turns.charge("a", 1.0, 0.0)
    assert not turns.has_allowance("a", 0.0)
    assert turns.has_allowance("a", 0.1)
    turns.charge("a", 0.0, 10_000.0)
    turns.charge("a", 60.0, 10_000.0)
    assert not turns.has_allowance("a", 10_000.0)


async def test_places_are_handed_on_by_turns_and_to_nobody_who_has_left() -> None:
    queue = TurnQueue(1, 60.0)
    begun: list[str] = []
    gate = asyncio.Event()

    async def work(tenant: str) -> None:
        async with queue.place(tenant):
            begun.append(tenant)
            await gate.wait()

    tasks = [asyncio.create_task(work(tenant)) for tenant in "aaaabc"]
    await asyncio.sleep(0)
    assert (begun, queue.num_waiting) == (["a"], 5)
    tasks[4].cancel()  # b leaves while it waits
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert begun == ["a", "a", "c", "a", "a"]
    assert (queue.num_waiting, queue.num_free) == (0, 1)


async def test_who_leaves_in_the_moment_of_being_handed_a_place_gives_it_on() -> None:
    queue = TurnQueue(1, 60.0)
    begun: list[str] = []

    async def work(tenant: str) -> None:
        async with queue.place(tenant):
            begun.append(tenant)

    async with queue.place("a"):
        leaves, stays = asyncio.create_task(work("b")), asyncio.create_task(work("c"))
        await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.gather(leaves, stays, return_exceptions=True)
    assert (begun, queue.num_free) == (["c"], 1)
