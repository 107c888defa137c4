"""Compares the ledger with the engines' own counters, replica by replica and token by token. Pure.

An engine counts what it computed, the ledger what was reported to the routers; both end a request at the same moment.
With nothing in flight, any difference between the two is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of one replica."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    """Requests that the engine ran: those with at least one prompt token."""

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
    """An engine's counters: its totals since it started."""

    started_ns: int
    totals: Totals


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """The ledger's totals for one replica."""

    totals: Totals = Totals()
    num_estimated: int = 0
    """Requests whose tokens are an estimate, since their engine was lost."""


class Finding(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    GONE = "gone"
    """In the ledger, but the engine no longer exists: not compared."""
    RESTARTED = "restarted"
    """The engine started after the window began, so its earlier counts are lost: not compared."""


@dataclass(frozen=True, slots=True)
class ReplicaComparison:
    """The comparison of one replica."""

    replica_id: str
    ledger: Totals
    engine: Totals | None
    """None: not compared."""
    num_estimated: int
    finding: Finding

    @property
    def difference(self) -> Totals:
        """Ledger minus engine."""
        return Totals() if self.engine is None else self.ledger - self.engine


@dataclass(frozen=True, slots=True)
class Comparison:
    """All replicas, in alphabetical order."""

    lines: tuple[ReplicaComparison, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every replica that could be compared has a difference of 0."""
        return all(line.finding is not Finding.DIFFERENT for line in self.lines)


def compare(
    ledger: Mapping[str, LedgerTotals],
    engines: Mapping[str, CounterReading],
    earlier: Mapping[str, CounterReading] | None = None,
) -> Comparison:
    """Compare by replica id.

    Without `earlier`, engines' totals since their start are compared, and the ledger's must be of all time. With it,
    what they counted since those readings is compared, and the ledger's must be of the time since; a replica that did
    not exist then has counted from 0.
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
