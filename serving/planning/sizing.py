"""Finds by simulation how many replicas meet a latency objective at a given rate. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.planning.curve import ServiceCurve
from serving.planning.simulation import Pages, SimulatedOutcome, iterate_rates, simulate_open

CELL = 8
"""Most replicas that are simulated together. More replicas share load slightly better, so a larger fleet that is sized
by the rate per replica of these has some spare capacity."""
_ROUNDS = 10
_MIN_PAGES, _MAX_PAGES = 2000, 4000
_RUN_SLOS = 15
"""A run lasts at least so many times the objective, as far as the number of pages allows."""
_LONE_RATE = 1e-4


class PlanError(ValueError):
    """No number of replicas meets the objective, or the question is invalid; the message says what to change."""


@dataclass(slots=True)
class Sizing:
    """The objective: so many seconds at the 95th percentile, with engines below a fraction of their peak rate.

    The rate per replica in a fleet of k is computed once and does not depend on the load, so that more load never needs
    fewer replicas.
    """

    curve: ServiceCurve
    pages: Pages
    slo_p95_s: float
    max_utilisation: float
    say: Callable[[str], None] = lambda _: None
    _rates: dict[int, float] = field(default_factory=dict)

    @property
    def peak_rate(self) -> float:
        """Return the pages per second of a replica that is always full."""
        return self.curve.peak_pages_per_s(self.pages.prompt_tokens, self.pages.mean_output)

    def rate_per_replica(self, num_replicas: int) -> float:
        """Return the pages per second and replica that a fleet of this size handles within the objective. It is the
        same for all sizes from `CELL` on.

        Raises:
            PlanError: even a page that is alone misses the objective.
        """
        size = min(num_replicas, CELL)
        if size not in self._rates:
            self.say(f"simulating {size} replicas")
            self._rates[size] = self._find_rate(size)
        return self._rates[size]

    def num_replicas(self, pages_per_s: float) -> int:
        """Return the smallest number of replicas that handles this rate within the objective."""
        by_cell = math.ceil(pages_per_s / self.rate_per_replica(CELL))
        if by_cell >= CELL:
            return by_cell
        return next(size for size in range(1, CELL + 1) if size * self.rate_per_replica(size) >= pages_per_s)

    def look(self, num_replicas: int, pages_per_s: float) -> SimulatedOutcome:
        """Simulate what clients observe at this rate; of a large fleet only a part is simulated, with its share of the
        load."""
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
