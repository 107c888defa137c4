"""How many replicas keep a promise at a given rate, by simulation. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.planning.curve import ServiceCurve
from serving.planning.simulation import Pages, SimulatedOutcome, iterate_rates, simulate_open

CELL = 8
"""Replicas that are simulated together at most. More share their load a little better still, so that a larger fleet,
sized by the rate per replica of these, has some room to spare."""
_ROUNDS = 10
_MIN_PAGES, _MAX_PAGES = 2000, 4000
_RUN_SLOS = 15
"""A run lasts so many times the promised time at least, as far as the number of pages allows."""
_LONE_RATE = 1e-4


class PlanError(ValueError):
    """No number of replicas can do what is asked, or what is asked makes no sense; the message says what to change."""


@dataclass(slots=True)
class Sizing:
    """The promise: so many seconds at the 95th percentile, and engines that are not driven beyond a part of their peak.

    What a replica can do in a fleet of k is found once and does not depend on the load, so more load never needs fewer
    replicas.
    """

    curve: ServiceCurve
    pages: Pages
    slo_p95_s: float
    max_utilisation: float
    say: Callable[[str], None] = lambda _: None
    _rates: dict[int, float] = field(default_factory=dict)

    @property
    def peak_rate(self) -> float:
        """Pages per second of a replica that is always full."""
        return self.curve.peak_pages_per_s(self.pages.prompt_tokens, self.pages.mean_output)

    def rate_per_replica(self, num_replicas: int) -> float:
        """Pages per second and replica that a fleet of this size takes within the promise; from `CELL` on it is one.

        Raises:
            PlanError: not even a page that is alone keeps the promise.
        """
        size = min(num_replicas, CELL)
        if size not in self._rates:
            self.say(f"simulating {size} replicas")
            self._rates[size] = self._find_rate(size)
        return self._rates[size]

    def num_replicas(self, pages_per_s: float) -> int:
        """The fewest that take this rate within the promise."""
        by_cell = math.ceil(pages_per_s / self.rate_per_replica(CELL))
        if by_cell >= CELL:
            return by_cell
        return next(size for size in range(1, CELL + 1) if size * self.rate_per_replica(size) >= pages_per_s)

    def look(self, num_replicas: int, pages_per_s: float) -> SimulatedOutcome:
        """What clients of a fleet see at this rate; of a large one a part is simulated with its part of the load."""
        size = min(num_replicas, CELL)
        return self._simulate(size, pages_per_s / num_replicas * size)

    def _find_rate(self, size: int) -> float:
        lone = self._simulate(size, _LONE_RATE)
        if lone.p95_s > self.slo_p95_s:
            raise PlanError(
                f"even pages that are alone on their replica take {lone.p95_s:.1f} s at the 95th percentile, so no "
                f"number of replicas keeps {self.slo_p95_s:g} s: allow more time, shorter answers or faster engines"
            )

        def keeps(rate: float) -> bool:
            return self._simulate(size, rate * size).p95_s <= self.slo_p95_s

        most = self.peak_rate * self.max_utilisation
        if keeps(most):
            return most
        rate = list(iterate_rates(0.0, most, keeps, _ROUNDS))[-1]
        if not rate:
            raise PlanError(f"a replica keeps {self.slo_p95_s:g} s only next to idle: allow more time")
        return rate

    def _simulate(self, size: int, pages_per_s: float) -> SimulatedOutcome:
        wanted = self.peak_rate * size * self.slo_p95_s * _RUN_SLOS
        num_pages = int(min(_MAX_PAGES, max(_MIN_PAGES, wanted)))
        return simulate_open(self.curve, self.pages, num_replicas=size, pages_per_s=pages_per_s, num_pages=num_pages)
