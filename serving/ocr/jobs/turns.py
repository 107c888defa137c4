"""Decides which tenant's job is read next, and which running job yields its slot. Pure, with the clock passed in.

A slot goes to the tenant with the fewest running jobs over all services; among several, to the one whose last turn at
this service was longest ago. A running job yields its slot between two pages and continues there on its next turn:
immediately when its tenant has two more jobs running than a tenant that waits, after `turn_s` when it has one more.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class OwnerJobs:
    """Numbers of a tenant's open jobs in the database."""

    owner: str
    num_running: int
    """Jobs that some service is reading."""
    num_free: int
    """Jobs that no service is reading."""
    oldest_ns: int
    """When the oldest free job was created, in nanoseconds since 1970."""


@dataclass(frozen=True, slots=True)
class HeldJob:
    """A job that this service is reading."""

    job_id: str
    owner: str
    since_s: float
    can_leave: bool = True
    """Whether a page of it is done: a job must make progress in each of its turns."""
    is_leaving: bool = False
    """Whether it was asked to yield its slot."""


@dataclass(slots=True)
class JobTurns:
    """Remembers when each tenant last had a turn at this service."""

    turn_s: float
    _last_s: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def note(self, owner: str, now_s: float) -> None:
        """Record that a job of this tenant starts or continues."""
        self._last_s[owner] = now_s
        self._last_s.move_to_end(owner)
        if len(self._last_s) > _MAX_REMEMBERED:
            self._last_s.popitem(last=False)

    def rank(self, tenants: Iterable[OwnerJobs]) -> list[OwnerJobs]:
        """Tenants that have a free job, in the order of their turns."""
        return sorted(
            (each for each in tenants if each.num_free),
            key=lambda each: (each.num_running, self._last_s.get(each.owner, -math.inf), each.oldest_ns),
        )

    def choose_leaving(self, held: Sequence[HeldJob], tenants: Sequence[OwnerJobs], now_s: float) -> list[str]:
        """Ids of jobs that should yield their slots, when all slots are taken.

        The slots of jobs that are leaving already count as assigned to the tenants that are first in turn.
        """
        num_running = Counter({each.owner: each.num_running for each in tenants})
        num_free = Counter({each.owner: each.num_free for each in tenants})
        ranked = [each.owner for each in self.rank(tenants)]
        candidates = [job for job in held if job.can_leave and not job.is_leaving]
        is_leaving = [job for job in held if job.is_leaving]
        chosen: list[str] = []
        while waiting := sorted((owner for owner in ranked if num_free[owner]), key=num_running.__getitem__):
            owner = waiting[0]  # the sort is stable: among equals the one ranked first
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
