"""Whose job is read next, and whose gives its place up meanwhile. Pure, the clock passed in.

Places go to the tenant with the fewest jobs running, whichever service runs them; of several to the one whose turn here
was longest ago. A job that runs gives its place up between two pages, and goes on from there when its turn comes again:
at once when its tenant has two more running than one that waits, after `turn_s` when it has one more.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class OwnerJobs:
    """A tenant's open jobs, as the database has them."""

    owner: str
    num_running: int
    """That some service reads."""
    num_free: int
    """That nobody reads."""
    oldest_ns: int
    """When the oldest of the free ones was made, since the epoch."""


@dataclass(frozen=True, slots=True)
class HeldJob:
    """A job that this service reads."""

    job_id: str
    owner: str
    since_s: float
    can_leave: bool = True
    """Whether a page of it is done: a job must get on in each of its turns."""
    is_leaving: bool = False
    """Whether it has been told to give its place up."""


@dataclass(slots=True)
class JobTurns:
    """Remembers who had a turn at this service, and when."""

    turn_s: float
    _last_s: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def note(self, owner: str, now_s: float) -> None:
        """A job of this tenant begins or goes on."""
        self._last_s[owner] = now_s
        self._last_s.move_to_end(owner)
        if len(self._last_s) > _MAX_REMEMBERED:
            self._last_s.popitem(last=False)

    def rank(self, tenants: Iterable[OwnerJobs]) -> list[OwnerJobs]:
        """Tenants that have a job nobody reads, the one whose turn it is first."""
        return sorted(
            (each for each in tenants if each.num_free),
            key=lambda each: (each.num_running, self._last_s.get(each.owner, -math.inf), each.oldest_ns),
        )

    def choose_leaving(self, held: Sequence[HeldJob], tenants: Sequence[OwnerJobs], now_s: float) -> list[str]:
        """Jobs of this service that are to give their places up, where all places are taken.

        Places of those that are leaving already are as good as given to the tenants that come first.
        """
        num_running = Counter({each.owner: each.num_running for each in tenants})
        num_free = Counter({each.owner: each.num_free for each in tenants})
        ranked = [each.owner for each in self.rank(tenants)]
        candidates = [job for job in held if job.can_leave and not job.is_leaving]
        is_leaving = [job for job in held if job.is_leaving]
        chosen: list[str] = []
        while waiting := sorted((owner for owner in ranked if num_free[owner]), key=num_running.__getitem__):
            owner = waiting[0]  # of several with as many running the one ranked first: sorting keeps their order
            if is_leaving:
                job = is_leaving.pop()
            else:
                leaving = [job for job in candidates if self._must_leave(job, owner, num_running, now_s)]
                if not leaving:
                    break
                job = max(leaving, key=lambda each: (num_running[each.owner], now_s - each.since_s))
                candidates.remove(job)
                chosen.append(job.job_id)
            num_running[job.owner] -= 1
            num_running[owner] += 1
            num_free[owner] -= 1
        return chosen

    def _must_leave(self, job: HeldJob, waiting: str, num_running: Counter[str], now_s: float) -> bool:
        ahead = num_running[job.owner] - num_running[waiting]
        return ahead >= 2 or (ahead == 1 and now_s - job.since_s >= self.turn_s)
