"""Fair shares of a limited resource: slots, memory, disk space. Pure.

A tenant may hold a fixed part of what the other tenants leave free, and always a minimum. A tenant that takes all it
can therefore leaves something for the next, which again leaves a part of that. Without authentication there is only
one tenant; a share would merely keep resources idle, so it may hold everything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from serving.errors import OverloadedError, RateLimitError


class Holder(Protocol):
    """The tenant behind a request; `Caller` implements this."""

    @property
    def owner(self) -> str: ...

    @property
    def is_one_of_many(self) -> bool:
        """Whether tenants are told apart, so that a share must be left for others."""
        ...


@dataclass(frozen=True, slots=True)
class Refusals:
    """The two refusals of a resource. The codes also label the refusals in the metrics."""

    own_code: str
    own_message: str
    """For a tenant that holds its full share: says what it can do about it."""
    full_code: str
    full_message: str
    """For any tenant, when everything is taken."""
    retry_after_s: float


@dataclass(slots=True)
class Shares:
    """Counts what each tenant holds."""

    total: float
    tenant_share: float
    """Part (0 to 1) of what others leave free that one tenant may hold."""
    refusals: Refusals
    least: float = 1
    """A tenant may always hold this much, however little the others leave."""
    _held: Counter[str] = field(default_factory=Counter)
    num_held: int = 0
    """Total over all tenants."""

    def hold(self, holder: Holder) -> Holding:
        """A context that releases what was taken in it: `with shares.hold(caller) as held: held.take(1)`."""
        return Holding(self, holder)

    def check(self, holder: Holder, amount: int = 1) -> None:
        """Check whether a tenant may hold this much more.

        Raises:
            RateLimitError: the tenant would hold more than its share.
            OverloadedError: not enough is left.
        """
        mine = self._held[holder.owner]
        if mine + amount > self._allowed(holder):
            raise RateLimitError(self.refusals.own_message, self.refusals.retry_after_s, code=self.refusals.own_code)
        if self.num_held + amount > self.total:
            raise OverloadedError(self.refusals.full_message, self.refusals.retry_after_s, code=self.refusals.full_code)

    def add(self, owner: str, amount: int) -> None:
        """Count an amount as held, whether it fits or not; a negative amount releases."""
        self.num_held += amount
        self._held[owner] += amount
        if not self._held[owner]:
            del self._held[owner]

    def replace(self, held: Mapping[str, int]) -> None:
        """Replace all counts with these amounts by tenant."""
        self._held = Counter(held)
        self.num_held = self._held.total()

    def _allowed(self, holder: Holder) -> float:
        if not holder.is_one_of_many:
            return math.inf
        left = self.total - (self.num_held - self._held[holder.owner])
        return max(self.least, self.tenant_share * left)


@dataclass(slots=True)
class Holding:
    """What one request holds; released when its context ends."""

    _shares: Shares
    _holder: Holder
    _amount: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shares.add(self._holder.owner, -self._amount)
        self._amount = 0

    def take(self, amount: int) -> None:
        """Hold more.

        Raises:
            RateLimitError: the tenant would hold more than its share.
            OverloadedError: not enough is left.
        """
        self._shares.check(self._holder, amount)
        self._shares.add(self._holder.owner, amount)
        self._amount += amount
