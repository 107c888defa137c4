"""Places requests on replicas: the one module where queue, load balancing and circuit breakers meet the event loop.

The decisions are made in `queue`, `balance`, `circuit_breaker` and `work_estimate`. This module adds the futures that
queued requests wait on, one timer per model for what happens without an event (a deadline, the end of a breaker's
pause), and the record of what is in flight. A request that finds room costs neither a task nor a timer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from serving.billing.records import TokenCounts
from serving.cluster.directory import EMPTY, ReplicaRecord, RouterReport, Snapshot
from serving.errors import EngineError, OverloadedError, ReplicaUnreachableError, ServingError, UpstreamError
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.balance import Fleet, Need, ReplicaLoad, choose
from serving.router.scheduling.circuit_breaker import NO_PROBE, Breakers, BreakerState
from serving.router.scheduling.model_pool import Pool, Waiting, no_replica, refuse
from serving.router.scheduling.queue import AdmissionQueue, check_deadline, retry_after_s
from serving.router.scheduling.slot import Slot
from serving.router.scheduling.work_estimate import (
    ImageReading,
    OutputForecast,
    WorkEstimate,
    estimate_work,
    read_images,
)
from serving.settings.stack import Settings
from serving.settings.tenants import Identity, Priority

_MIN_DELAY_S = 0.001  # a timer that fires slightly early must not fire again immediately


class Dispatcher:
    """Queues requests for replicas, places them, and keeps track of what is in flight. One per router process."""

    def __init__(
        self,
        settings: Settings,
        read_snapshot: Callable[[], Snapshot],
        *,
        router_id: str,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
    ) -> None:
        """`read_snapshot` returns the current replica list, the same object for as long as it has not changed."""
        self._router = settings.router
        self._read_snapshot = read_snapshot
        self._lease_s = settings.engine.lease_s
        self._router_id = router_id
        self._clock = clock
        self._rng = rng or Random()  # breaks ties, needs no secrecy
        self._snapshot: Snapshot = EMPTY
        admission = settings.router.admission
        self._pools = {model: Pool(AdmissionQueue(admission.max_queue)) for model in settings.models}
        self._fleet = Fleet(admission.work_per_replica, admission.high_reserve)
        self._num_slots = 0
        self._forecast = OutputForecast(admission.expected_output_tokens)
        self._breakers = Breakers(settings.router.breaker)

    def sample(self, model: str) -> ReplicaRecord | None:
        """A replica that represents all of a model's; the last one known while there is none."""
        self._adopt_snapshot()
        return self._pools[model].sample

    def image_config(self, model: str) -> Mapping[str, Any]:
        """The image settings of a model's checkpoint; empty while no replica has reported them."""
        replica = self.sample(model)
        return {} if replica is None or replica.image_config is None else dict(replica.image_config)

    def estimate(self, request: RoutedRequest, reading: ImageReading, max_model_len: int) -> WorkEstimate:
        """The work that a request is admitted with; `reading` and `max_model_len` are those of the model's `sample`."""
        return estimate_work(request, reading, self._forecast, max_model_len)

    async def enter(self, request: RoutedRequest, work: WorkEstimate, identity: Identity, *, deadline_s: float) -> Slot:
        """Place a request on a replica, immediately if one has room. Cancelling takes it out of the queue immediately.

        Args:
            request: its model must be in the settings.
            work: what `estimate` returned for it.
            identity: its tenant determines the priority class, and shares that class fairly with other tenants.
            deadline_s: when the client stops waiting, on the dispatcher's clock.

        Raises:
            OverloadedError: the queue is full, or the deadline cannot be met or has passed.
            NoReplicaError: no replica of the model appeared within `replica_wait_s`.
        """
        self._adopt_snapshot()
        now_s = self._clock()
        pool = self._pools[request.model]
        priority = identity.tenant.priority
        if deadline_s > now_s and not pool.queue.has_ahead(priority):
            load = self._find(pool, work, request, priority, now_s)
            if load is not None:
                return self._place(request, work, load, now_s, now_s)
        return await self._wait(pool, request, work, identity, deadline_s, now_s)

    async def _wait(
        self,
        pool: Pool,
        request: RoutedRequest,
        work: WorkEstimate,
        identity: Identity,
        deadline_s: float,
        now_s: float,
    ) -> Slot:
        tenant_id, priority = identity.tenant_id, identity.tenant.priority
        pool.check_availability(self._breakers.blocked(now_s), now_s)
        wait_s = None
        if pool.unavailable_since_s is None:
            ahead = pool.queue.work_ahead(tenant_id, priority, work.total)
            wait_s = pool.wait_s(ahead + work.total)
        elif self._router.admission.replica_wait_s <= 0:
            self._set_timer(pool, now_s)
            raise no_replica()
        check_deadline(wait_s, pool.service_s(request, work), deadline_s - now_s)
        placed: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        waiter = Waiting(tenant_id, priority, work.total, now_s, deadline_s, request, work, placed)
        try:
            pushed_out = pool.queue.push(waiter)
        except OverloadedError as error:
            error.retry_after_s = retry_after_s(wait_s)
            raise
        if pushed_out is not None:
            refuse(
                pushed_out,
                OverloadedError(
                    "Requests with a better claim to a place are waiting; try again later.", retry_after_s(wait_s)
                ),
            )
        self._place_queued(pool, now_s)  # sets the timer; and if the displaced request was next, another may fit now
        try:
            return await placed
        except asyncio.CancelledError:
            if pool.queue.remove(waiter):
                self._place_queued(pool, self._clock())
            elif not placed.cancelled() and placed.exception() is None:
                placed.result().close(None)  # the place was granted at the moment the client left
            raise

    def move(self, slot: Slot, error: ServingError) -> bool:
        """See `Slot.fail`."""
        now_s = self._clock()
        load = slot.load
        if isinstance(error, EngineError):
            slot.succeed()  # it refused this request, and is healthy
        elif isinstance(error, UpstreamError) and not slot.has_verdict and not load.is_gone:
            slot.has_verdict = True
            self._breakers.fail(load.replica_id, slot.probe, now_s)
        if not error.is_retryable or slot.num_tries >= self._router.max_tries:
            return False
        self._adopt_snapshot()
        pool = self._pools[slot.request.model]
        has_moved = self._transfer(slot, pool, now_s)
        if has_moved:
            self._place_queued(pool, now_s)
        return has_moved

    async def wait_for_replacement(self, slot: Slot, error: ServingError) -> bool:
        """See `Slot.wait_for_replacement`."""
        longest_wait_s = self._router.admission.replica_wait_s
        if not isinstance(error, ReplicaUnreachableError) or slot.num_tries >= self._router.max_tries:
            return False
        pool = self._pools[slot.request.model]
        moved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        pool.stranded[slot] = moved
        try:
            self._place_queued(pool, self._clock())  # sets the timer
            await asyncio.wait([moved], timeout=min(longest_wait_s, self._lease_s))
            failed = (*slot.failed_ids, slot.load.replica_id)
            # A replica that is still listed after a whole lease was not lost, so no replacement will appear. Nor may it
            # get the request again: engines count by request id.
            if not moved.done() and not any(load.replica_id in failed for load in pool.loads):
                await asyncio.wait([moved], timeout=max(0.0, longest_wait_s - self._lease_s))
            return moved.done() and moved.result()
        finally:
            if pool.stranded.pop(slot, None) is not None:
                self._set_timer(pool, self._clock())

    def _transfer(self, slot: Slot, pool: Pool, now_s: float) -> bool:
        """Move a request whose replica failed to another one, if there is one."""
        failed = (*slot.failed_ids, slot.load.replica_id)
        excluded = self._breakers.blocked(now_s).union(failed)
        need = self._need(slot.work, slot.request, Priority.HIGH)  # it has been admitted already
        target = choose(pool.loads, need, excluded, self._rng) or choose(pool.loads, None, excluded, self._rng)
        if target is None:
            return False
        self._leave(slot)
        target.add(slot.work.total, max(1, slot.request.num_choices))
        slot.load, slot.probe = target, self._breakers.begin(target.replica_id)
        slot.reading = read_images(slot.request, target.record)
        slot.num_tries += 1
        slot.failed_ids, slot.has_verdict, slot.started_s = failed, False, now_s
        return True

    def succeed(self, slot: Slot) -> None:
        """See `Slot.succeed`."""
        self._breakers.succeed(slot.load.replica_id, slot.probe)

    def release(self, slot: Slot, used: TokenCounts | None, is_whole: bool) -> None:
        """See `Slot.close`."""
        self._leave(slot)
        self._num_slots -= 1
        request = slot.request
        pool = self._pools[request.model]
        now_s = self._clock()
        if used is not None and is_whole and used.num_completion_tokens > 0:
            per_choice = used.num_completion_tokens / max(1, request.num_choices)
            self._forecast.observe(request.model, slot.reading.label, len(request.image_sizes), per_choice)
            pool.rate.finish(pool.share(slot.work.total), now_s - slot.started_s, round(per_choice))
        if pool.queue:
            self._place_queued(pool, now_s)

    def refresh(self) -> None:
        """The replica list may have changed: place waiting requests on new replicas, forget replicas that have left."""
        self._adopt_snapshot()
        self._place_queued_in_all()

    def absorb(self, reports: tuple[RouterReport, ...]) -> None:
        """Replace what is known of the other routers' work by their latest reports, all of them every time."""
        self._fleet.absorb([report for report in reports if report.router_id != self._router_id])
        self._place_queued_in_all()

    def tick(self) -> None:
        """Called about every second, to act on changes that no event announced."""
        self.refresh()

    def close(self) -> None:
        """Refuse all waiting requests and stop all timers."""
        for pool in self._pools.values():
            for waiter in pool.queue.take_older(math.inf):
                refuse(waiter, OverloadedError("The router is going down; try again."))
            for moved in pool.stranded.values():
                moved.set_result(False)
            pool.stranded.clear()
            self._set_timer(pool, self._clock())

    def queued_work(self) -> dict[str, int]:
        """Queued work in tokens by model; models without any are left out."""
        return {model: pool.queue.work for model, pool in self._pools.items() if pool.queue}

    def replica_work(self) -> dict[str, int]:
        """Work in flight through this router, in tokens by replica id; replicas without any are left out."""
        return self._fleet.work()

    def queue_lengths(self) -> dict[tuple[str, Priority], int]:
        """Queued requests by model and priority class, zeros included."""
        return {(model, p): pool.queue.num_waiting(p) for model, pool in self._pools.items() for p in Priority}

    def breaker_states(self) -> dict[str, BreakerState]:
        """By the id of every listed replica."""
        now_s = self._clock()
        return {record.replica_id: self._breakers.state(record.replica_id, now_s) for record in self._snapshot.records}

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued and no slot is open."""
        return not self._num_slots and not any(pool.queue for pool in self._pools.values())

    @property
    def num_replicas(self) -> int:
        """Replicas that are listed or still have requests in flight."""
        return len(self._fleet)

    @property
    def num_timers(self) -> int:
        """Timers that are set: none while no request is queued."""
        return sum(pool.timer is not None for pool in self._pools.values())

    def _need(self, work: WorkEstimate, request: RoutedRequest, priority: Priority) -> Need:
        return Need(work.total, max(1, request.num_choices), priority is Priority.HIGH, self._fleet.num_routers)

    def _find(
        self, pool: Pool, work: WorkEstimate, request: RoutedRequest, priority: Priority, now_s: float
    ) -> ReplicaLoad | None:
        return choose(pool.loads, self._need(work, request, priority), self._breakers.blocked(now_s), self._rng)

    def _place(
        self, request: RoutedRequest, work: WorkEstimate, load: ReplicaLoad, entered_s: float, now_s: float
    ) -> Slot:
        load.add(work.total, max(1, request.num_choices))
        self._num_slots += 1
        reading = read_images(request, load.record)
        probe = self._breakers.begin(load.replica_id)
        return Slot(self, request, work, now_s - entered_s, load, reading, probe, now_s)

    def _leave(self, slot: Slot) -> None:
        """Take a slot's work off its replica. An unlisted replica is forgotten with its last request."""
        load = slot.load
        load.add(-slot.work.total, -max(1, slot.request.num_choices))
        if slot.probe != NO_PROBE and not slot.has_verdict:
            self._breakers.release(load.replica_id, slot.probe)
        self._fleet.forget(load)

    def _adopt_snapshot(self) -> None:
        """Adopt the replica list if it has changed."""
        snapshot = self._read_snapshot()
        if snapshot is self._snapshot:
            return
        self._snapshot = snapshot
        self._breakers.retain({record.replica_id for record in snapshot.records})
        ready = self._fleet.follow(snapshot)
        for model in ready.keys() - self._pools.keys():
            self._pools[model] = Pool(AdmissionQueue(self._router.admission.max_queue))
        for model, pool in self._pools.items():
            pool.offer(ready.get(model, []))
        self._place_queued_in_all()

    def _place_queued_in_all(self) -> None:
        now_s = self._clock()
        for pool in self._pools.values():
            self._place_queued(pool, now_s)

    def _place_queued(self, pool: Pool, now_s: float) -> None:
        """Place queued requests in order for as long as the next one fits, and refuse those that are too late."""
        # Requests that lost their replica were admitted before, so they go first.
        for slot in [slot for slot in pool.stranded if self._transfer(slot, pool, now_s)]:
            pool.stranded.pop(slot).set_result(True)
        for late in pool.queue.take_expired(now_s):
            refuse(late, pool.too_late())
        while (waiter := pool.queue.head()) is not None:
            if waiter.placed.done():  # cancelled, but its coroutine has not run yet
                pool.queue.remove(waiter)
                continue
            if now_s + pool.service_s(waiter.request, waiter.estimate) > waiter.deadline_s:
                pool.queue.remove(waiter)  # a replica would work on it in vain
                refuse(waiter, pool.too_late())
                continue
            load = self._find(pool, waiter.estimate, waiter.request, waiter.priority, now_s)
            if load is None:
                break
            pool.queue.pop(waiter)
            waiter.placed.set_result(self._place(waiter.request, waiter.estimate, load, waiter.entered_s, now_s))
        pool.check_availability(self._breakers.blocked(now_s), now_s)
        longest_wait_s = self._router.admission.replica_wait_s
        if pool.unavailable_since_s is not None and pool.unavailable_since_s + longest_wait_s <= now_s:
            for late in pool.queue.take_older(now_s - longest_wait_s):
                refuse(late, no_replica())
        self._set_timer(pool, now_s)

    def _set_timer(self, pool: Pool, now_s: float) -> None:
        """Note whether requests are queued, and set the timer for what happens next without an event."""
        next_s = pool.note(now_s, self._breakers.next_change_s(now_s), self._router.admission.replica_wait_s)
        if pool.timer_s <= next_s < math.inf:
            return  # it fires early, finds nothing to do and is set again: cheaper than resetting it for every request
        if pool.timer is not None:
            pool.timer.cancel()
            pool.timer = None
        pool.timer_s = next_s
        if next_s < math.inf:
            delay_s = max(_MIN_DELAY_S, next_s - now_s)
            pool.timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer, pool)

    def _on_timer(self, pool: Pool) -> None:
        pool.timer, pool.timer_s = None, math.inf
        self._place_queued(pool, self._clock())
