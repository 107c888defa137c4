"""Circuit breakers: a failing replica gets no requests for a while, then a single probe. Pure.

    state      a verdict of                success             failure                     no verdict
    CLOSED     any request                 forget failures     count; at the limit: OPEN   -
    OPEN       one that began before       -                   -                           -
    HALF_OPEN  the probe                   CLOSED              OPEN, pause doubled         the next may probe
    HALF_OPEN  one that began before       -                   -                           -

OPEN becomes HALF_OPEN when its pause has elapsed. After Nygard, "Release It!", chapter 5.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from serving.settings.router import BreakerSettings

NO_PROBE = 0
_NONE: frozenset[str] = frozenset()


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class _Breaker:
    num_failures: int = 0
    """Consecutive, while closed."""
    pause_s: float = 0.0
    """0 while closed."""
    until_s: float = 0.0
    """When the pause has elapsed."""
    probe: int = NO_PROBE
    """The number of the request that probes the replica now."""


@dataclass(slots=True)
class Breakers:
    """The breakers of all replicas. A replica without failures takes no memory."""

    settings: BreakerSettings
    _breakers: dict[str, _Breaker] = field(default_factory=dict)
    _num_probes: int = 0

    def blocked(self, now_s: float) -> frozenset[str]:
        """Replicas that must not be sent a request now."""
        if not self._breakers:
            return _NONE
        return frozenset(
            replica_id
            for replica_id, breaker in self._breakers.items()
            if breaker.pause_s and (breaker.probe or now_s < breaker.until_s)
        )

    def begin(self, replica_id: str) -> int:
        """A request goes to a replica that is not blocked.

        Returns:
            A number to be passed on with the request's verdict: the probe's, or NO_PROBE for any other request.
        """
        breaker = self._breakers.get(replica_id)
        if breaker is None or not breaker.pause_s:
            return NO_PROBE
        self._num_probes += 1
        breaker.probe = self._num_probes
        return breaker.probe

    def succeed(self, replica_id: str, probe: int) -> None:
        """The replica answered."""
        breaker = self._breakers.get(replica_id)
        if breaker is not None and (not breaker.pause_s or (probe and probe == breaker.probe)):
            del self._breakers[replica_id]

    def fail(self, replica_id: str, probe: int, now_s: float) -> None:
        """The replica was unreachable, broke the connection or answered with a 5xx."""
        breaker = self._breakers.setdefault(replica_id, _Breaker())
        if breaker.pause_s:
            if not probe or probe != breaker.probe:
                return  # it began before the pause, so it is no new evidence
            breaker.pause_s = min(2 * breaker.pause_s, self._longest_s)
        else:
            breaker.num_failures += 1
            if breaker.num_failures < self.settings.failures:
                return
            breaker.pause_s = min(self.settings.open_s, self._longest_s)
        breaker.probe = NO_PROBE
        breaker.until_s = now_s + breaker.pause_s

    def release(self, replica_id: str, probe: int) -> None:
        """A request ended without a verdict, since its client left: if it was the probe, the next request may be."""
        breaker = self._breakers.get(replica_id)
        if probe and breaker is not None and breaker.probe == probe:
            breaker.probe = NO_PROBE

    def state(self, replica_id: str, now_s: float) -> BreakerState:
        breaker = self._breakers.get(replica_id)
        if breaker is None or not breaker.pause_s:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_s < breaker.until_s else BreakerState.HALF_OPEN

    def next_change_s(self, now_s: float) -> float | None:
        """When the next pause will have elapsed; None if there is none."""
        return min((b.until_s for b in self._breakers.values() if b.until_s > now_s), default=None)

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget all other replicas: they have left."""
        for replica_id in [known for known in self._breakers if known not in replica_ids]:
            del self._breakers[replica_id]

    @property
    def _longest_s(self) -> float:
        return max(self.settings.open_s, self.settings.max_open_s)
