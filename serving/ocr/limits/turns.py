"""Whose turn it is when several tenants wait for a few places. Pure, the clock passed in; `TurnQueue` waits on it.

Tenants take turns, one page each. Pages differ in cost by a factor of a thousand, so a tenant also has an allowance
of CPU seconds that fills at a steady rate: a tenant that has used it up waits behind those that have not. Its debt is
bounded, and the allowance goes on filling while it waits, so it is back in turn after a bounded time. Nobody is held
back while a place would stay empty.
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
"""Tenants whose allowances are remembered before full ones are dropped."""


@dataclass(slots=True)
class Allowance:
    """CPU seconds that a tenant may still use before it waits behind others: a token bucket that may go below zero."""

    rate: float
    """CPU seconds per second."""
    burst_cpu_s: float
    """Most that it holds, and most that it may owe."""
    level_cpu_s: float
    filled_s: float
    """When the level was last brought up to date."""

    def fill(self, now_s: float) -> None:
        self.level_cpu_s = min(self.burst_cpu_s, self.level_cpu_s + self.rate * max(0.0, now_s - self.filled_s))
        self.filled_s = now_s

    def charge(self, cpu_s: float, now_s: float) -> None:
        self.fill(now_s)
        self.level_cpu_s = max(-self.burst_cpu_s, self.level_cpu_s - cpu_s)


@dataclass(slots=True)
class Turns(Generic[Item]):
    """Items that wait, by tenant. While one waits whose tenant has an allowance left, every other tenant has at
    most one item begun before it, for each item of its own tenant's that came earlier and for itself."""

    cpu_s_per_minute: float
    """Rate of a tenant's allowance, which holds a minute's worth."""
    _waiting: dict[str, deque[Item]] = field(default_factory=dict)
    """Tenants in the order of their turns; those with nothing to wait for are left out."""
    _allowances: dict[str, Allowance] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, item: Item) -> None:
        self._waiting.setdefault(tenant, deque()).append(item)

    def remove(self, tenant: str, item: Item) -> None:
        """An item is not wanted any more. One that has been taken is not here, and changes nothing."""
        items = self._waiting.get(tenant)
        if items is None or item not in items:
            return
        items.remove(item)
        if not items:
            del self._waiting[tenant]

    def take(self, now_s: float) -> Item | None:
        """The item whose turn it is; None when none waits."""
        if not self._waiting:
            return None
        tenant = next((name for name in self._waiting if self.has_allowance(name, now_s)), next(iter(self._waiting)))
        items = self._waiting.pop(tenant)
        item = items.popleft()
        if items:
            self._waiting[tenant] = items  # at the end: the others come first
        return item

    def charge(self, tenant: str, cpu_s: float, now_s: float) -> None:
        """A tenant's item has used so much."""
        allowance = self._allowances.get(tenant)
        if allowance is None:
            self._forget_full(now_s)
            burst = self.cpu_s_per_minute
            allowance = self._allowances[tenant] = Allowance(burst / 60, burst, burst, now_s)
        allowance.charge(cpu_s, now_s)

    def has_allowance(self, tenant: str, now_s: float) -> bool:
        """Whether a tenant's items go before those of tenants that have used up theirs."""
        allowance = self._allowances.get(tenant)
        if allowance is None:
            return True
        allowance.fill(now_s)
        return allowance.level_cpu_s > 0

    def _forget_full(self, now_s: float) -> None:
        """A full allowance is the same as none."""
        if len(self._allowances) < _MAX_ALLOWANCES:
            return
        for tenant, allowance in list(self._allowances.items()):
            allowance.fill(now_s)
            if allowance.level_cpu_s >= allowance.burst_cpu_s:
                del self._allowances[tenant]


class TurnQueue:
    """A few places, given out by turns. Use it inside one event loop."""

    def __init__(self, num_places: int, cpu_s_per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_free = num_places
        self._turns: Turns[asyncio.Future[None]] = Turns(cpu_s_per_minute)
        self._clock = clock

    @property
    def num_waiting(self) -> int:
        return len(self._turns)

    @contextlib.asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn and hold a place for as long as the context lasts."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.add(tenant, turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            self._turns.remove(tenant, turn)
            if turn.done() and not turn.cancelled():  # it was handed a place in the same moment
                self._give_back()
            raise
        try:
            yield
        finally:
            self._give_back()

    def charge(self, tenant: str, cpu_s: float) -> None:
        """A tenant's item has used so much."""
        self._turns.charge(tenant, cpu_s, self._clock())

    def _give_back(self) -> None:
        self._num_free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._num_free and (turn := self._turns.take(self._clock())) is not None:
            if not turn.done():  # one that was cancelled has left
                self._num_free -= 1
                turn.set_result(None)
