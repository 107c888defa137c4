"""The queue for a model's replicas: who is next, and how long the wait will be. Pure.

The rules:

- Requests of a higher priority class go before all requests of lower ones.
- Within a class tenants share by deficit round robin (Shreedhar and Varghese, "Efficient Fair Queueing using Deficit
  Round Robin", SIGCOMM 1995) on work, so a tenant gains nothing by sending more or larger requests. Requests of one
  tenant stay in order.
- The request that is next stays next. While it fits on no replica, no request of its class or a lower one may pass it,
  however small; running work ends, so sooner or later it fits. The room left free meanwhile is smaller than its work.
- The queue has a maximum length. When it is full, a newcomer may displace another request: a higher class displaces the
  lowest one, and within a class a tenant with few requests displaces the latest of the tenant with most. (After
  McKenney, "Stochastic Fairness Queueing", INFOCOM 1990: otherwise a flood fills the queue and keeps others out.)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from serving.errors import OverloadedError
from serving.settings.tenants import Priority

_RANK = {priority: rank for rank, priority in enumerate(Priority)}
_MIN_MEMORY_S = 10.0  # seconds under load after which a measurement's weight has dropped to a third
_MEMORY_RESIDENCES = 4  # the same in multiples of a request's time on its replica, lest completions come in bursts
_SMOOTHING = 0.05
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_MIN_COMPACTED = 64


@dataclass(slots=True, eq=False)
class Waiter:
    """One queued request; compared by identity. Times are seconds on the caller's clock."""

    tenant_id: str
    priority: Priority
    work: int
    """Tokens."""
    entered_s: float
    deadline_s: float
    is_waiting: bool = field(default=False, init=False)


W = TypeVar("W", bound=Waiter)


@dataclass(slots=True, eq=False)
class _Flow(Generic[W]):
    """One tenant's queued requests in one priority class."""

    tenant_id: str
    waiters: OrderedDict[W, None] = field(default_factory=OrderedDict)
    work: int = 0
    deficit: int = 0
    """Work that it may still start in this round of turns."""
    is_in_turn: bool = False
    """Whether the quantum of this round has been added."""


@dataclass(slots=True)
class _Lane(Generic[W]):
    """One priority class: the flows in order of turns."""

    flows: OrderedDict[str, _Flow[W]] = field(default_factory=OrderedDict)
    quantum: int = 1
    """Never less than the work of any queued request, so that every turn serves one: that makes DRR O(1)."""
    work: int = 0
    num: int = 0

    def push(self, waiter: W) -> None:
        flow = self.flows.get(waiter.tenant_id)
        if flow is None:
            flow = self.flows[waiter.tenant_id] = _Flow(waiter.tenant_id)
        flow.waiters[waiter] = None
        flow.work += waiter.work
        self.work += waiter.work
        self.num += 1
        self.quantum = max(self.quantum, waiter.work)

    def head(self) -> W | None:
        while self.flows:
            flow = next(iter(self.flows.values()))
            if not flow.is_in_turn:
                flow.is_in_turn = True
                flow.deficit += self.quantum
            waiter = next(iter(flow.waiters))
            if waiter.work <= flow.deficit:
                return waiter
            flow.is_in_turn = False
            self.flows.move_to_end(flow.tenant_id)
        return None

    def remove(self, waiter: W, *, is_served: bool) -> None:
        flow = self.flows[waiter.tenant_id]
        del flow.waiters[waiter]
        flow.work -= waiter.work
        self.work -= waiter.work
        self.num -= 1
        if is_served:
            flow.deficit -= waiter.work
        if not flow.waiters:  # an idle tenant accumulates no deficit
            del self.flows[waiter.tenant_id]
        if not self.flows:
            self.quantum = 1

    def longest(self) -> _Flow[W]:
        return max(self.flows.values(), key=lambda flow: len(flow.waiters))


class AdmissionQueue(Generic[W]):
    """The requests queued for one model. Operations are O(1) unless they say otherwise."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._lanes: tuple[_Lane[W], ...] = tuple(_Lane() for _ in Priority)
        self._num = 0
        self._deadlines: list[tuple[float, int, W]] = []  # requests that have left are dropped when they come up
        self._by_age: OrderedDict[W, None] = OrderedDict()
        self._num_pushed = 0

    def __len__(self) -> int:
        return self._num

    @property
    def num_deadlines(self) -> int:
        """Deadlines in memory, including those of requests that have left."""
        return len(self._deadlines)

    def __iter__(self) -> Iterator[W]:
        """Oldest first."""
        return iter(self._by_age)

    @property
    def work(self) -> int:
        """Of all queued requests, in tokens."""
        return sum(lane.work for lane in self._lanes)

    def num_waiting(self, priority: Priority) -> int:
        return self._lanes[_RANK[priority]].num

    def has_ahead(self, priority: Priority) -> bool:
        """Whether any request is queued that a newcomer of this class may not pass."""
        return self._num > 0 and any(lane.num for lane in self._lanes[: _RANK[priority] + 1])

    def push(self, waiter: W) -> W | None:
        """Queue a request. O(tenants) if the queue is full.

        Returns:
            The request that was displaced by it, already removed.

        Raises:
            OverloadedError: the queue is full, and no request has to give way to this one.
        """
        pushed_out = None
        if self._num >= self._max_queue:
            pushed_out = self._find_displaced(waiter)
            if pushed_out is None:
                raise OverloadedError("Too many requests are waiting for this model; try again later.")
            self.remove(pushed_out)
        self._lanes[_RANK[waiter.priority]].push(waiter)
        waiter.is_waiting = True
        self._num += 1
        self._by_age[waiter] = None
        self._num_pushed += 1
        heappush(self._deadlines, (waiter.deadline_s, self._num_pushed, waiter))
        return pushed_out

    def _find_displaced(self, newcomer: W) -> W | None:
        rank = _RANK[newcomer.priority]
        lowest = next((i for i in reversed(range(len(self._lanes))) if self._lanes[i].num), -1)
        if lowest < rank:
            return None
        longest = self._lanes[lowest].longest()
        if lowest == rank:
            own = self._lanes[rank].flows.get(newcomer.tenant_id)
            if len(longest.waiters) <= (len(own.waiters) if own else 0) + 1:
                return None
        return next(reversed(longest.waiters))

    def head(self) -> W | None:
        """The next request. It stays next until it is popped, leaves, or one of a higher class arrives. O(tenants) at
        worst, when many tenants in turn have used up their deficit."""
        if not self._num:
            return None
        lane = next(lane for lane in self._lanes if lane.num)
        return lane.head()

    def pop(self, head: W) -> None:
        """The next request has been placed on a replica."""
        self._take_out(head, is_served=True)

    def remove(self, waiter: W) -> bool:
        """A request leaves unserved; returns whether it was queued."""
        if not waiter.is_waiting:
            return False
        self._take_out(waiter, is_served=False)
        return True

    def _take_out(self, waiter: W, *, is_served: bool) -> None:
        waiter.is_waiting = False
        self._lanes[_RANK[waiter.priority]].remove(waiter, is_served=is_served)
        self._num -= 1
        del self._by_age[waiter]
        if len(self._deadlines) > 2 * self._num + _MIN_COMPACTED:
            self._deadlines = [entry for entry in self._deadlines if entry[2].is_waiting]
            heapify(self._deadlines)

    def next_deadline_s(self) -> float:
        """The nearest deadline of all queued requests; infinity if there are none."""
        while self._deadlines and not self._deadlines[0][2].is_waiting:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def take_expired(self, now_s: float) -> list[W]:
        """Remove and return requests whose deadline has come."""
        expired = []
        while self.next_deadline_s() <= now_s:
            waiter = self._deadlines[0][2]
            self.remove(waiter)
            expired.append(waiter)
        return expired

    def take_older(self, entered_s: float) -> list[W]:
        """Remove and return requests that were queued by then."""
        older = []
        while self._by_age and (waiter := next(iter(self._by_age))).entered_s <= entered_s:
            self.remove(waiter)
            older.append(waiter)
        return older

    def work_ahead(self, tenant_id: str, priority: Priority, work: int) -> int:
        """Work that will start before that of a newcomer. O(tenants).

        All work of higher classes; within its own class the work that its tenant has queued, and up to as much of every
        other tenant, since tenants take turns.
        """
        rank = _RANK[priority]
        lane = self._lanes[rank]
        own = lane.flows.get(tenant_id)
        before = own.work if own else 0
        others = sum(min(flow.work, before + work) for flow in lane.flows.values() if flow is not own)
        return sum(higher.work for higher in self._lanes[:rank]) + before + others


@dataclass(slots=True)
class ServiceRate:
    """How fast the replicas of a model work, measured while requests are queued: at other times they could do more than
    they are given. Work is a share of the capacity of all replicas, so that the rate holds when their number changes.
    """

    _work: float = 0.0
    _time_s: float = 0.0
    _is_busy: bool = False
    _marked_s: float = 0.0
    _residence_s: float | None = None
    _num_output: float | None = None

    def mark(self, is_busy: bool, now_s: float) -> None:
        """Note whether requests are queued from now on."""
        if self._is_busy and now_s > self._marked_s:
            memory_s = max(_MIN_MEMORY_S, _MEMORY_RESIDENCES * (self._residence_s or 0.0))
            fade = math.exp(-(now_s - self._marked_s) / memory_s)
            self._work *= fade
            self._time_s = self._time_s * fade + memory_s * (1 - fade)
        self._is_busy = is_busy
        self._marked_s = now_s

    def finish(self, share: float, residence_s: float, num_output: int) -> None:
        """A request has been answered.

        Args:
            share: its work, relative to the capacity of all replicas.
            residence_s: how long it was on its replica.
            num_output: tokens in the answer of one choice.
        """
        if self._is_busy:
            self._work += share
        self._residence_s = _smooth(self._residence_s, residence_s)
        self._num_output = _smooth(self._num_output, num_output)

    def wait_s(self, share: float, share_under_way: float) -> float | None:
        """Seconds until so much work has ended; None while nothing is known.

        Args:
            share: the work, relative to the capacity of all replicas.
            share_under_way: the work on the replicas now, likewise. By Little's law it gives a rate while none has been
                measured: all of it ends in about the time that one request stays. It weighs as much as one such time.
        """
        work = self._work + share_under_way
        if self._residence_s is None or work <= 0:
            return None
        return share * (self._time_s + self._residence_s) / work

    def service_s(self, num_output: int) -> float:
        """Seconds that an answer of so many tokens takes on its replica: proportional to the mean answer, and never
        more than it, since a guess must not refuse what may well be answered. 0 while nothing is known."""
        if self._residence_s is None or not self._num_output:
            return 0.0
        return self._residence_s * min(1.0, num_output / self._num_output)


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)


def retry_after_s(wait_s: float | None) -> float:
    """The `Retry-After` of a refusal, in seconds: the estimate within bounds, since an estimate of hours is
    worthless."""
    return min(max(wait_s or 0.0, _MIN_RETRY_S), _MAX_RETRY_S)


def check_deadline(wait_s: float | None, service_s: float, remaining_s: float) -> None:
    """Refuse a request that would probably be given up before it is answered, since the replica's time would be wasted.
    Under overload the queue would otherwise grow until every request is served too late.

    Args:
        wait_s: seconds until it is placed; None if unknown.
        service_s: how long the answer takes. Twice that is allowed for, since answers vary and some are that long.
        remaining_s: seconds until its deadline.

    Raises:
        OverloadedError: the wait and the answer together take longer than there is time.
    """
    if remaining_s <= 0 or (wait_s is not None and wait_s + 2 * service_s >= remaining_s):
        raise OverloadedError(
            "The model is too busy to answer within the time that this request allows.",
            retry_after_s(wait_s),
            code="deadline_unmeetable",
        )
