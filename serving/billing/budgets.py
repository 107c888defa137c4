"""Monthly budgets: what a tenant may spend in a calendar month, UTC. Pure.

Before it runs, every request reserves the most that it can cost; when it has ended, it settles its actual cost. It is
admitted only if the reservation fits into what is neither spent nor reserved, so a tenant's spending through one router
never exceeds its budget, however many requests run concurrently.

`refresh` brings what was spent through other routers every few seconds, but not what they have reserved. So with
several routers a tenant may exceed its budget by what it spends through the others between two refreshes, and by what
they have in flight when the budget is used up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from serving.billing.periods import month_of
from serving.billing.prices import format_dollars
from serving.errors import QuotaExceededError, RateLimitError

_RETRY_S = 1.0  # it is unknown when a running request will end


class BudgetState(StrEnum):
    OK = "ok"
    WARNING = "warning"
    EXHAUSTED = "exhausted"


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """A tenant's budget in one month; amounts in nanodollars."""

    month: str
    limit_nanodollars: int | None
    """None: no budget."""
    spent_nanodollars: int
    reserved_nanodollars: int
    state: BudgetState

    @property
    def used_percent(self) -> int:
        """Spent part of the limit, rounded down; 0 without a limit, 100 if the limit is 0."""
        if self.limit_nanodollars is None:
            return 0
        return 100 * self.spent_nanodollars // self.limit_nanodollars if self.limit_nanodollars else 100

    @property
    def left_nanodollars(self) -> int | None:
        """Unspent part of the limit; None without a limit."""
        return None if self.limit_nanodollars is None else max(0, self.limit_nanodollars - self.spent_nanodollars)


@dataclass(slots=True)
class Reservation:
    """Held by a request while it runs. `Budgets.settle` settles it once."""

    tenant_id: str
    month: str
    nanodollars: int
    is_settled: bool = False


@dataclass(slots=True)
class Budgets:
    """What tenants have spent, as one router knows it."""

    warn_percent: int = 80
    _own: Counter[tuple[str, str]] = field(default_factory=Counter)
    _others: dict[tuple[str, str], int] = field(default_factory=dict)
    _reserved: Counter[tuple[str, str]] = field(default_factory=Counter)
    """All three by month and tenant."""

    def reserve(
        self,
        tenant_id: str,
        *,
        limit_nanodollars: int | None,
        most_nanodollars: int,
        now_ns: int,
        param: str | None = None,
    ) -> Reservation:
        """Reserve the most that a request can cost; it belongs to the month of its arrival, `now_ns`.

        Args:
            tenant_id: whose budget it is.
            limit_nanodollars: the budget; None is no limit.
            most_nanodollars: the most that the request can cost.
            now_ns: when it arrived.
            param: the field of the request that makes it so expensive, for the refusal.

        Raises:
            QuotaExceededError: the month's budget is spent, or the rest of it does not pay for this request.
            RateLimitError: it would if running requests had not reserved it; worth a retry when they have ended.
        """
        status = self.status(tenant_id, limit_nanodollars=limit_nanodollars, now_ns=now_ns)
        left = status.left_nanodollars
        if left is not None and limit_nanodollars is not None:
            if left <= 0:
                raise QuotaExceededError(
                    f"The budget of ${_format(limit_nanodollars)} for {status.month} is spent; requests are served "
                    "again next month, or when the operator raises it."
                )
            if most_nanodollars > left:
                remedy = f"request a smaller {param}" if param is not None else "shorten the prompt"
                raise QuotaExceededError(
                    f"This request can cost ${_format(most_nanodollars)}, but only ${_format(left)} of the budget for "
                    f"{status.month} is left; {remedy}, or have the operator raise the budget.",
                    param=param,
                )
            if most_nanodollars > left - status.reserved_nanodollars:
                raise RateLimitError(
                    f"Running requests may need the ${_format(left)} that is left of the budget for {status.month}; "
                    "try again when they have ended.",
                    _RETRY_S,
                )
        self._reserved[status.month, tenant_id] += most_nanodollars
        return Reservation(tenant_id, status.month, most_nanodollars)

    def settle(self, reservation: Reservation, cost_nanodollars: int) -> None:
        """A request has ended, and its actual cost replaces the reservation. Settling it again changes nothing."""
        if reservation.is_settled:
            return
        reservation.is_settled = True
        key = reservation.month, reservation.tenant_id
        self._reserved[key] -= reservation.nanodollars
        if not self._reserved[key]:
            del self._reserved[key]
        self._own[key] += cost_nanodollars

    def refresh(self, month: str, others: Mapping[str, int]) -> None:
        """Take in what tenants have spent in a month through other routers, as `Ledger.read_month` returns it.

        Routers' sums only grow, so an outdated answer is recognised by being smaller.
        """
        for tenant_id, nanodollars in others.items():
            key = month, tenant_id
            self._others[key] = max(nanodollars, self._others.get(key, 0))

    def forget_before(self, month: str) -> None:
        """Drop what is known about earlier months, except reservations in flight."""
        for amounts in (self._own, self._others):
            for key in [key for key in amounts if key[0] < month]:
                del amounts[key]

    def status(self, tenant_id: str, *, limit_nanodollars: int | None, now_ns: int) -> BudgetStatus:
        """A tenant's budget in the month of `now_ns`."""
        month = month_of(now_ns)
        key = month, tenant_id
        spent = self._own[key] + self._others.get(key, 0)
        reserved = self._reserved[key]
        if limit_nanodollars is None or 100 * spent < self.warn_percent * limit_nanodollars:
            state = BudgetState.OK
        else:
            state = BudgetState.WARNING if spent < limit_nanodollars else BudgetState.EXHAUSTED
        return BudgetStatus(month, limit_nanodollars, spent, reserved, state)


def _format(nanodollars: int) -> str:
    return format_dollars(nanodollars).rstrip("0").rstrip(".")
