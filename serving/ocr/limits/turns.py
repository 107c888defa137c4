"""Fair scheduling of a few slots among tenants. Pure, with the clock passed in; `TurnQueue` adds the waiting.

Tenants take turns, one page each. Pages differ in cost by a factor of a thousand, so each tenant also has an allowance
of CPU seconds that refills at a steady rate, and a tenant that has used it up waits behind those that have not. Its
debt is bounded and the allowance refills while it waits, so it waits for a bounded time only. A slot never stays empty
while a tenant waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

_MAX_ALLOWANCES = 1024
"""Number of tenants from which on full allowances are dropped."""


@dataclass(slots=True)
class Allowance:
    """CPU seconds that a tenant may use before it waits behind others: a token bucket that may go below zero."""

    rate: float
    """Refill rate in CPU seconds per second."""
    burst_cpu_s: float
    """Upper bound of the level; its negative is the lower bound."""
    level_cpu_s: float
    filled_s: float
    """When the level was last updated."""

    def fill(self, now_s: float) -> None:
        self.level_cpu_s = min(self.burst_cpu_s, self.level_cpu_s + self.rate * max(0.0, now_s - self.filled_s))
        self.filled_s = now_s

    def charge(self, cpu_s: float, now_s: float) -> None:
        self.fill(now_s)
        self.level_cpu_s = max(-self.burst_cpu_s, self.level_cpu_s - cpu_s)


@dataclass(slots=True)
class Turns(Generic[Item]):
    """Waiting items by tenant.

    While an item waits whose tenant has an allowance left, every other tenant starts at most one item for each of the
    earlier items of that tenant, and one for the item itself.
    """

    cpu_s_per_minute: float
    """Refill rate of each tenant's allowance, which holds one minute's worth."""
    _waiting: dict[str, deque[Item]] = field(default_factory=dict)
    """Tenants in the order of their turns, without those that have nothing waiting."""
    _allowances: dict[str, Allowance] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, item: Item) -> None:
        self._waiting.setdefault(tenant, deque()).append(item)

    def remove(self, tenant: str, item: Item) -> None:
        """Drop an item that is no longer wanted. Does nothing when it was taken already."""
        items = self._waiting.get(tenant)
        if items is None or item not in items:
            return
        items.remove(item)
        if not items:
            del self._waiting[tenant]

    def take(self, now_s: float) -> Item | None:
        """The next item; None when nothing waits."""
        if not self._waiting:
            return None
        tenant = next((name for name in self._waiting if self.has_allowance(name, now_s)), next(iter(self._waiting)))
        items = self._waiting.pop(tenant)
        item = items.popleft()
        if items:
            self._waiting[tenant] = items  # at the end: the others come first
        return item

    def charge(self, tenant: str, cpu_s: float, now_s: float) -> None:
        """Deduct CPU seconds that a tenant's item has used."""
        allowance = self._allowances.get(tenant)
        if allowance is None:
            self._forget_full(now_s)
            burst = self.cpu_s_per_minute
            allowance = self._allowances[tenant] = Allowance(burst / 60, burst, burst, now_s)
        allowance.charge(cpu_s, now_s)

    def has_allowance(self, tenant: str, now_s: float) -> bool:
        """Whether a tenant's items take precedence over those of tenants that have used up their allowance."""
        return self.find_allowance(tenant, now_s) > 0

    def find_allowance(self, tenant: str, now_s: float) -> float:
        """CPU seconds that a tenant has left; below zero, what it owes."""
        allowance = self._allowances.get(tenant)
        if allowance is None:
            return self.cpu_s_per_minute
        allowance.fill(now_s)
        return allowance.level_cpu_s

    def _forget_full(self, now_s: float) -> None:
        """Drop allowances that are full, which is the same as having none."""
        if len(self._allowances) < _MAX_ALLOWANCES:
            return
        for tenant, allowance in list(self._allowances.items()):
            allowance.fill(now_s)
            if allowance.level_cpu_s >= allowance.burst_cpu_s:
                del self._allowances[tenant]


class TurnQueue:
    """A few slots, given out by turns. Use it inside one event loop."""

    def __init__(self, num_places: int, cpu_s_per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_free = num_places
        """Slots that are free."""
        self._turns: Turns[asyncio.Future[None]] = Turns(cpu_s_per_minute)
        self._clock = clock

    @property
    def num_waiting(self) -> int:
        return len(self._turns)

    @contextlib.asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a slot and hold it as long as the context lasts."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.add(tenant, turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            self._turns.remove(tenant, turn)
            if turn.done() and not turn.cancelled():  # it was given a slot at the same moment
                self._give_back()
            raise
        try:
            yield
        finally:
            self._give_back()

    def charge(self, tenant: str, cpu_s: float) -> None:
        """Deduct CPU seconds that a tenant's item has used."""
        self._turns.charge(tenant, cpu_s, self._clock())

    def find_allowance(self, tenant: str) -> float:
        """CPU seconds that a tenant has left; below zero, what it owes."""
        return self._turns.find_allowance(tenant, self._clock())

    def _give_back(self) -> None:
        self.num_free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self.num_free and (turn := self._turns.take(self._clock())) is not None:
            if not turn.done():  # it was cancelled
                self.num_free -= 1
                turn.set_result(None)
