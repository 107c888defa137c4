from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.billing_samples import SAMPLE, make_record

from serving.billing.database import Database
from serving.billing.periods import Window
from serving.billing.queries import sum_by_replica
from serving.billing.reconcile import CounterReading, Finding, LedgerTotals, Totals, compare
from serving.billing.records import LostTry, TokenCounts

EVER = Window(0, 2**63 - 1)
TOTALS = st.builds(Totals, st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))


@given(st.dictionaries(st.sampled_from("abc"), TOTALS), st.dictionaries(st.sampled_from("abc"), TOTALS))
def test_only_equal_counts_are_equal(ledger: dict[str, Totals], engines: dict[str, Totals]) -> None:
    found = compare(
        {name: LedgerTotals(totals) for name, totals in ledger.items()},
        {name: CounterReading(1, totals) for name, totals in engines.items()},
    )
    assert [line.replica_id for line in found.lines] == sorted(ledger.keys() | engines.keys())
    assert found.is_equal == all(ledger.get(name, Totals()) == totals for name, totals in engines.items())
    for line in found.lines:
        assert (line.difference == Totals()) == (line.finding is not Finding.DIFFERENT)
        assert (line.finding is Finding.GONE) == (line.replica_id not in engines)


def test_a_window_begins_at_an_earlier_reading() -> None:
    ledger = {"old": LedgerTotals(Totals(5, 5, 1)), "new": LedgerTotals(Totals(1, 1, 1)), "again": LedgerTotals()}
    earlier = {"old": CounterReading(1, Totals(100, 100, 10)), "again": CounterReading(1, Totals(7, 7, 7))}
    engines = {
        "old": CounterReading(1, Totals(105, 105, 11)),
        "new": CounterReading(2, Totals(1, 1, 1)),
        "again": CounterReading(3, Totals()),
    }
    found = compare(ledger, engines, earlier)
    assert {line.replica_id: line.finding for line in found.lines} == {
        "old": Finding.EQUAL,
        "new": Finding.EQUAL,
        "again": Finding.RESTARTED,
    }
    assert found.is_equal
    worse = compare(ledger, {**engines, "old": CounterReading(1, Totals(105, 106, 11))}, earlier)
    assert not worse.is_equal
    assert next(line.difference for line in worse.lines if line.replica_id == "old") == Totals(0, -1, 0)


async def test_the_ledger_counts_by_replica_what_engines_count(database: Database) -> None:
    await database.insert(
        [
            make_record(0),
            make_record(1, lost_tries=(LostTry("nano#2", 1000, 7), LostTry("nano#3"))),
            make_record(2, is_estimated=True, replica_id="nano#2", tokens=TokenCounts(1, 0, 0, 2)),
            make_record(3, replica_id="", tokens=TokenCounts()),
            make_record(4, tokens=TokenCounts()),  # the engine refused it
            make_record(5, ended_ns=SAMPLE.ended_ns + 1),
        ]
    )
    async with database.reading() as connection:
        assert await sum_by_replica(connection, EVER) == {
            "nano#1": LedgerTotals(Totals(3000, 1500, 3)),
            "nano#2": LedgerTotals(Totals(1001, 9, 2), num_estimated=1),
            "nano#3": LedgerTotals(),
        }
        later = await sum_by_replica(connection, Window(SAMPLE.ended_ns + 1, EVER.end_ns))
    assert later == {"nano#1": LedgerTotals(Totals(1000, 500, 1))}
