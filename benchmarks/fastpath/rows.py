"""One figure beside a peer's: what every benchmark of this repository prints and writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """ratio: how much better ours is than the peer's, above 1 is better; None when one of them alone is zero.
    floor: what nothing can go under, or None."""

    measure: str
    ours: float
    peer: float
    peer_name: str
    floor: float | None
    unit: str
    ratio: float | None

    @classmethod
    def of_costs(cls, measure: str, ours: float, peer: float, peer_name: str, floor: float | None, unit: str) -> Row:
        """Of figures where less is better."""
        return cls(measure, ours, peer, peer_name, floor, unit, _quotient(peer, ours))

    @classmethod
    def of_rates(cls, measure: str, ours: float, peer: float, peer_name: str, floor: float | None, unit: str) -> Row:
        """Of figures where more is better."""
        return cls(measure, ours, peer, peer_name, floor, unit, _quotient(ours, peer))


def _quotient(upper: float, lower: float) -> float | None:
    if upper == lower:
        return 1.0
    return upper / lower if upper and lower else None


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process while the work is done: what else runs on the machine is not in it."""
    begin = time.process_time()
    work()
    return time.process_time() - begin
