"""The ledger beside the engines' own counters: replica by replica, token by token. Pure.

An engine counts what it computed, the ledger what the routers were told; both end a request at the same moment. Where
nothing is in flight, the difference of the two is 0, or there is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one replica."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    """That the engine took: those with at least one prompt token."""

    def __sub__(self, other: Totals) -> Totals:
        return Totals(
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            self.requests - other.requests,
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.requests + other.requests,
        )


@dataclass(frozen=True, slots=True)
class CounterReading:
    """An engine's counters: totals since it started."""

    started_ns: int
    totals: Totals


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """What the ledger has of one replica."""

    totals: Totals = Totals()
    num_estimated: int = 0
    """Requests whose tokens are an estimate, since their engine was lost."""


class Finding(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    GONE = "gone"
    """In the ledger, but there is no engine left to ask: not compared."""
    RESTARTED = "restarted"
    """The engine started after the window began: its earlier counts are lost, so it is not compared."""


@dataclass(frozen=True, slots=True)
class ReplicaComparison:
    """One replica compared."""

    replica_id: str
    ledger: Totals
    engine: Totals | None
    """None: not compared."""
    num_estimated: int
    finding: Finding

    @property
    def difference(self) -> Totals:
        """Ledger less engine."""
        return Totals() if self.engine is None else self.ledger - self.engine


@dataclass(frozen=True, slots=True)
class Comparison:
    """All replicas, in the order of their names."""

    lines: tuple[ReplicaComparison, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every replica that can be compared shows a difference of 0."""
        return all(line.finding is not Finding.DIFFERENT for line in self.lines)


def compare(
    ledger: Mapping[str, LedgerTotals],
    engines: Mapping[str, CounterReading],
    earlier: Mapping[str, CounterReading] | None = None,
) -> Comparison:
    """Compare by replica id.

    Without `earlier`, engines' totals since their start are meant, and the ledger's must be of all time. With it, what
    they counted since those readings, and the ledger's must be of the time since; a replica that was not there then has
    counted from 0.
    """
    earlier = earlier or {}
    lines = []
    for replica_id in sorted(ledger.keys() | engines.keys()):
        booked = ledger.get(replica_id, LedgerTotals())
        reading, before = engines.get(replica_id), earlier.get(replica_id)
        if reading is None:
            lines.append(ReplicaComparison(replica_id, booked.totals, None, booked.num_estimated, Finding.GONE))
        elif before is not None and before.started_ns != reading.started_ns:
            lines.append(ReplicaComparison(replica_id, booked.totals, None, booked.num_estimated, Finding.RESTARTED))
        else:
            counted = reading.totals - before.totals if before is not None else reading.totals
            finding = Finding.EQUAL if counted == booked.totals else Finding.DIFFERENT
            lines.append(ReplicaComparison(replica_id, booked.totals, counted, booked.num_estimated, finding))
    return Comparison(tuple(lines))
