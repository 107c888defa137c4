from __future__ import annotations

import asyncio
from fractions import Fraction

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.billing_samples import NOON_NS, make_record

from serving.billing.database import Database, ReplicaLife
from serving.billing.periods import NS_PER_HOUR, Window
from serving.billing.queries import read_uptimes, sum_work
from serving.billing.records import TokenCounts
from serving.billing.stack_costs import TenantWork, Uptime, cost_of_time, report_costs, split
from serving.settings.billing import BillingSettings

DOLLAR = 10**9
HOUR = NS_PER_HOUR
AMOUNTS = st.integers(0, 10**12)


def test_cost_idle_time_and_margin_by_model_and_tenant() -> None:
    uptimes = [
        Uptime("nano#1", "nano", 10 * HOUR, 8 * HOUR, 2 * DOLLAR),
        Uptime("nano#2", "nano", 5 * HOUR, 0, 2 * DOLLAR),
        Uptime("large#1", "large", HOUR, HOUR, DOLLAR),
    ]
    work = [
        TenantWork("nano", "acme", 10, 30, 2_000_000, 0, 1_000_000, 0, 40 * DOLLAR),
        TenantWork("nano", "beta", 5, 10, 500_000, 0, 500_000, 0, DOLLAR),
    ]
    large, nano, acme, beta = report_costs(uptimes, work)
    assert (large.model, large.spend_nanodollars, large.idle_nanodollars) == ("large", DOLLAR, 0)
    assert large.per_million_tokens_nanodollars is None
    assert large.per_thousand_pages_nanodollars is None
    assert (nano.spend_nanodollars, nano.idle_nanodollars) == (30 * DOLLAR, 14 * DOLLAR)
    assert nano.margin_nanodollars == 11 * DOLLAR
    assert nano.per_million_tokens_nanodollars == 30 * DOLLAR // 4
    assert nano.per_thousand_pages_nanodollars == 750 * DOLLAR
    assert (acme.spend_nanodollars, beta.spend_nanodollars) == (12 * DOLLAR, 4 * DOLLAR)
    assert (acme.margin_nanodollars, beta.margin_nanodollars) == (28 * DOLLAR, -3 * DOLLAR)
    assert acme.per_thousand_pages_nanodollars == 400 * DOLLAR


@given(AMOUNTS, st.lists(st.integers(0, 10**9), max_size=20))
def test_parts_add_up_and_none_is_off_by_one(amount: int, weights: list[int]) -> None:
    parts = split(amount, weights)
    if not sum(weights):
        assert parts == [0] * len(weights)
        return
    assert sum(parts) == amount
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(amount * weight, sum(weights))) < 1


@given(st.integers(0, 10**18), st.integers(0, 10**13))
def test_time_costs_its_price_to_the_nearest_nanodollar(duration_ns: int, rate: int) -> None:
    assert abs(cost_of_time(duration_ns, rate) - Fraction(duration_ns * rate, HOUR)) <= Fraction(1, 2)


@given(
    st.lists(st.builds(Uptime, st.text(), st.sampled_from("ab"), AMOUNTS, AMOUNTS, AMOUNTS), max_size=5),
    st.lists(st.builds(TenantWork, st.sampled_from("abc"), st.text(), *[st.integers(0, 10**6)] * 7), max_size=8),
)
def test_tenants_and_idle_time_add_up_to_the_spend(uptimes: list[Uptime], work: list[TenantWork]) -> None:
    uptimes = [Uptime(u.replica_id, u.model, max(u.up_ns, u.busy_ns), u.busy_ns, 10**9) for u in uptimes]
    lines = report_costs(uptimes, work)
    totals = [line for i, line in enumerate(lines) if i == 0 or lines[i - 1].model != line.model]
    assert sum(line.spend_nanodollars for line in totals) == sum(cost_of_time(u.up_ns, 10**9) for u in uptimes)
    assert sum(line.revenue_nanodollars for line in totals) == sum(item.revenue_nanodollars for item in work)
    for total in totals:
        shares = [line for line in lines if line.model == total.model and line is not total]
        spent = sum(line.spend_nanodollars for line in shares)
        has_work = any(item.computed_tokens for item in work if item.model == total.model)
        assert spent == (total.spend_nanodollars - total.idle_nanodollars if has_work else 0)


async def test_uptime_and_work_are_read_from_the_ledger(database: Database) -> None:
    rate = 3 * DOLLAR
    await database.see_replicas(
        [
            ReplicaLife("nano#1", "nano", NOON_NS - HOUR, NOON_NS + 9 * HOUR, rate),
            ReplicaLife("nano#2", "nano", NOON_NS - 9 * HOUR, NOON_NS - 8 * HOUR, rate),
        ]
    )
    await database.insert(
        [
            make_record(1, arrived_ns=NOON_NS - HOUR, ended_ns=NOON_NS + HOUR),
            make_record(2, arrived_ns=NOON_NS + HOUR // 2, ended_ns=NOON_NS + 2 * HOUR),
            make_record(3, arrived_ns=NOON_NS + 3 * HOUR, ended_ns=NOON_NS + 8 * HOUR, tokens=TokenCounts(1, 0, 0, 1)),
            make_record(4, arrived_ns=NOON_NS + 1, ended_ns=NOON_NS + 2, replica_id="", model=""),
        ]
    )
    async with database.reading() as connection:
        window = Window(NOON_NS, NOON_NS + 4 * HOUR)
        assert await read_uptimes(connection, window) == [Uptime("nano#1", "nano", 4 * HOUR, 3 * HOUR, rate)]
        work = await sum_work(connection, window)
    assert work == [TenantWork("nano", "acme", 2, 4, 1001, 100, 501, 0, 160_000)]


SPANS = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 30), st.integers(0, 30)), max_size=12)


@given(SPANS)
@hypothesis.settings(max_examples=25)
def test_busy_time_is_the_union_of_the_requests(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[str, int, int]]
) -> None:
    async def run() -> dict[str, int]:
        database = Database(BillingSettings(directory=tmp_path_factory.mktemp("busy")))
        await database.migrate()
        await database.see_replicas([ReplicaLife(name, "nano", 0, 100) for name in "ab"])
        await database.insert(
            [
                make_record(number, replica_id=name, arrived_ns=begin, ended_ns=begin + length)
                for number, (name, begin, length) in enumerate(spans)
            ]
        )
        async with database.reading() as connection:
            uptimes = await read_uptimes(connection, Window(10, 40))
        await database.close()
        return {uptime.replica_id: uptime.busy_ns for uptime in uptimes}

    expected = {}
    for name in "ab":
        moments = {time for owner, begin, length in spans if owner == name for time in range(begin, begin + length)}
        expected[name] = len(moments & set(range(10, 40)))
    assert asyncio.run(run()) == expected
