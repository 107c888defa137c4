"""The replicas of one model, the requests queued for them, and what happens next without an event.

Nothing here waits or reads a clock; futures and the timer are only stored for the dispatcher.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field

from serving.cluster.directory import ReplicaRecord
from serving.errors import NoReplicaError, OverloadedError, ServingError
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.balance import ReplicaLoad
from serving.router.scheduling.queue import AdmissionQueue, ServiceRate, Waiter, retry_after_s
from serving.router.scheduling.slot import Slot
from serving.router.scheduling.work_estimate import WorkEstimate


@dataclass(slots=True, eq=False)
class Waiting(Waiter):
    """A queued request, and the future that its coroutine awaits."""

    request: RoutedRequest
    estimate: WorkEstimate
    placed: asyncio.Future[Slot]


@dataclass(slots=True)
class Pool:
    """One model's replicas and queue."""

    queue: AdmissionQueue[Waiting]
    loads: list[ReplicaLoad] = field(default_factory=list)
    """Loads of the ready replicas."""
    capacity: int = 0
    """Capacity of all of them, in tokens."""
    sample: ReplicaRecord | None = None
    """Represents all of them when work is estimated; the last one known while there is none."""
    rate: ServiceRate = field(default_factory=ServiceRate)
    unavailable_since_s: float | None = None
    """Since when queued requests have had no usable replica, full or not."""
    stranded: dict[Slot, asyncio.Future[bool]] = field(default_factory=dict)
    """Requests whose replica was lost while there was no other, each with a future for whether one has appeared."""
    timer: asyncio.TimerHandle | None = None
    timer_s: float = math.inf
    """When it fires."""

    def offer(self, loads: list[ReplicaLoad]) -> None:
        """These are the ready replicas from now on."""
        self.loads = loads
        self.capacity = sum(load.capacity for load in loads)
        self.sample = loads[0].record if loads else self.sample

    def share(self, work: int) -> float:
        """Work relative to the capacity of all replicas."""
        return work / max(1, self.capacity)

    def wait_s(self, work: int) -> float | None:
        """How long until so much work has ended; None while that is unknown."""
        return self.rate.wait_s(self.share(work), self.share(sum(load.work for load in self.loads)))

    def service_s(self, request: RoutedRequest, work: WorkEstimate) -> float:
        """How long the answer takes once it has begun; 0 while that is unknown."""
        return self.rate.service_s(work.output_tokens // max(1, request.num_choices))

    def check_availability(self, blocked: Collection[str], now_s: float) -> None:
        """Note whether any replica is usable; `blocked` are those with an open circuit breaker."""
        if any(load.replica_id not in blocked for load in self.loads):
            self.unavailable_since_s = None
        elif self.unavailable_since_s is None:
            self.unavailable_since_s = now_s

    def note(self, now_s: float, breaker_change_s: float | None, longest_wait_s: float) -> float:
        """Note whether requests are queued. Returns when something next happens without an event: a deadline, the end
        of a breaker's pause, or of the longest wait for a replica to appear; infinity if no request is queued."""
        self.rate.mark(len(self.queue) > 0 and self.unavailable_since_s is None, now_s)
        if not self.queue:
            self.unavailable_since_s = None
            return breaker_change_s if self.stranded and breaker_change_s is not None else math.inf
        next_s = self.queue.next_deadline_s()
        if breaker_change_s is not None:
            next_s = min(next_s, breaker_change_s)
        if self.unavailable_since_s is not None:
            oldest_s = next(iter(self.queue)).entered_s
            next_s = min(next_s, max(oldest_s, self.unavailable_since_s) + longest_wait_s)
        return next_s

    def too_late(self) -> OverloadedError:
        """For a request that has waited so long that it can no longer be answered in time."""
        message = "The time that this request allows was spent waiting for a replica."
        return OverloadedError(message, retry_after_s(self.wait_s(self.queue.work)), code="deadline_unmeetable")


def no_replica() -> NoReplicaError:
    return NoReplicaError("No replica of this model is ready; try again shortly.")


def refuse(waiting: Waiting, error: ServingError) -> None:
    """Wake the request with an error, unless its client has left."""
    if not waiting.placed.done():
        waiting.placed.set_exception(error)
