"""A request's place on a replica, from the moment it is placed until its answer has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serving.billing.records import TokenCounts
from serving.cluster.directory import ReplicaRecord
from serving.errors import ServingError
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.balance import ReplicaLoad
from serving.router.scheduling.work_estimate import ImageReading, WorkEstimate


class SlotOwner(Protocol):
    """What a slot needs of the dispatcher that gave it out. Every method is called by the slot of the same name."""

    def move(self, slot: Slot, error: ServingError) -> bool: ...

    async def wait_for_replacement(self, slot: Slot, error: ServingError) -> bool: ...

    def succeed(self, slot: Slot) -> None: ...

    def release(self, slot: Slot, used: TokenCounts | None, is_whole: bool) -> None: ...


@dataclass(slots=True, eq=False)
class Slot:
    """A place on a replica. Its holder must close it, however the request ends."""

    owner: SlotOwner
    request: RoutedRequest
    work: WorkEstimate
    """As it was admitted; it does not change when the request moves to another replica."""
    waited_s: float
    """How long the request was queued."""
    load: ReplicaLoad
    """The replica that has the request now."""
    reading: ImageReading
    """How that replica reads the request's images."""
    probe: int
    """The circuit breaker's number for this try, `NO_PROBE` for an ordinary one."""
    started_s: float
    """On the owner's clock: when this replica was given the request."""
    num_tries: int = 1
    failed_ids: tuple[str, ...] = ()
    """Replicas that have failed this request."""
    has_verdict: bool = False
    """Whether the circuit breaker knows how this try went."""
    is_closed: bool = False

    @property
    def replica(self) -> ReplicaRecord:
        return self.load.record

    def fail(self, error: ServingError) -> bool:
        """The replica failed with `error` before it answered: move to one that has not been tried yet.

        The request keeps its admission: it does not queue again, and may take a replica beyond its capacity.

        Returns:
            False if the error is not retryable, no replica is left or all tries are used up.
        """
        return not self.is_closed and self.owner.move(self, error)

    async def wait_for_replacement(self, error: ServingError) -> bool:
        """Called when `fail` found no other replica: wait for one to appear, as a queued request would.

        Only if the replica itself was lost. One that answers that it is overloaded is alive, and speaks for the others.

        Returns:
            False if the replica was not lost, all tries are used up, or none appeared within `replica_wait_s`.
        """
        return not self.is_closed and await self.owner.wait_for_replacement(self, error)

    def succeed(self) -> None:
        """The replica has answered."""
        if not self.has_verdict and not self.is_closed:
            self.has_verdict = True
            self.owner.succeed(self)

    def close(self, used: TokenCounts | None, *, is_whole: bool = True) -> None:
        """Give the place back. Closing it again changes nothing.

        Args:
            used: what the engine counted, None if nothing was answered.
            is_whole: whether the answer was complete. A truncated one says nothing about how long answers are.
        """
        if not self.is_closed:
            self.is_closed = True
            self.owner.release(self, used, is_whole)
