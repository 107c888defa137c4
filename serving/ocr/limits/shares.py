"""Shares of something that there is only so much of: places, memory, disk. Pure.

A tenant may hold a part of what the other tenants leave, and always a least amount: whoever takes all that it can get
leaves the other part free, and the next one leaves a part of that. Where nobody tells tenants apart, a share would only
keep the one user from what is there, and everybody may hold the whole.
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
    """Who holds something; `Caller` is one."""

    @property
    def owner(self) -> str: ...

    @property
    def is_one_of_many(self) -> bool:
        """Whether a share is kept for other tenants."""
        ...


@dataclass(frozen=True, slots=True)
class Refusals:
    """What is said to whom there is no room for. Codes name the reason in the metrics, too."""

    own_code: str
    own_message: str
    """To a tenant that holds its share: what it can do."""
    full_code: str
    full_message: str
    """To anybody when everything is taken."""
    retry_after_s: float


@dataclass(slots=True)
class Shares:
    """Counts what is held, by tenant."""

    total: float
    tenant_share: float
    """Part (0 to 1) of what others leave that one tenant may hold."""
    refusals: Refusals
    least: float = 1
    """What a tenant may hold however little the others leave."""
    _held: Counter[str] = field(default_factory=Counter)
    num_held: int = 0
    """By all together."""

    def hold(self, holder: Holder) -> Holding:
        """A context that gives back what was taken in it: `with shares.hold(caller) as held: held.take(1)`."""
        return Holding(self, holder)

    def check(self, holder: Holder, amount: int = 1) -> None:
        """Raises:
        RateLimitError: the tenant would hold more than its share.
        OverloadedError: there is not so much left.
        """
        mine = self._held[holder.owner]
        if mine + amount > self._allowed(holder):
            raise RateLimitError(self.refusals.own_message, self.refusals.retry_after_s, code=self.refusals.own_code)
        if self.num_held + amount > self.total:
            raise OverloadedError(self.refusals.full_message, self.refusals.retry_after_s, code=self.refusals.full_code)

    def add(self, owner: str, amount: int) -> None:
        """Count what is held, whether it fits or not; less with a negative amount."""
        self.num_held += amount
        self._held[owner] += amount
        if not self._held[owner]:
            del self._held[owner]

    def replace(self, held: Mapping[str, int]) -> None:
        """What is held now, by tenant, in the place of all that was counted."""
        self._held = Counter(held)
        self.num_held = self._held.total()

    def _allowed(self, holder: Holder) -> float:
        if not holder.is_one_of_many:
            return math.inf
        left = self.total - (self.num_held - self._held[holder.owner])
        return max(self.least, self.tenant_share * left)


@dataclass(slots=True)
class Holding:
    """What one request holds; given back when its context ends."""

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
            OverloadedError: there is not so much left.
        """
        self._shares.check(self._holder, amount)
        self._shares.add(self._holder.owner, amount)
        self._amount += amount
