"""Monthly budgets: what a tenant may spend in a calendar month, UTC. Pure.

Every request reserves what it may cost before it runs and settles what it did cost when it has ended. One is let in as
long as what is spent and reserved is below the limit, so that all requests together overshoot by no more than is in
flight. What other routers have spent comes by `refresh`, every few seconds; one's own spending is known at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from serving.billing.periods import month_of
from serving.billing.prices import format_dollars
from serving.errors import QuotaExceededError


class BudgetState(StrEnum):
    OK = "ok"
    WARNING = "warning"
    EXHAUSTED = "exhausted"


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """How a tenant stands in one month; amounts in nanodollars."""

    month: str
    limit_nanodollars: int | None
    """None: no budget."""
    spent_nanodollars: int
    reserved_nanodollars: int
    state: BudgetState

    @property
    def used_percent(self) -> int:
        """Of the limit, spent, rounded down; 0 without a limit, 100 of a limit of nothing."""
        if self.limit_nanodollars is None:
            return 0
        return 100 * self.spent_nanodollars // self.limit_nanodollars if self.limit_nanodollars else 100


@dataclass(slots=True)
class Reservation:
    """Held by a request while it runs. `Budgets.settle` takes it once."""

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
    """All by month and tenant."""

    def reserve(
        self, tenant_id: str, *, limit_nanodollars: int | None, estimate_nanodollars: int, now_ns: int
    ) -> Reservation:
        """Let a request in that may cost so much; it counts to the month of `now_ns`, its arrival.

        Raises:
            QuotaExceededError: the month's budget is spent or reserved.
        """
        status = self.status(tenant_id, limit_nanodollars=limit_nanodollars, now_ns=now_ns)
        if (
            limit_nanodollars is not None
            and status.spent_nanodollars + status.reserved_nanodollars >= limit_nanodollars
        ):
            raise QuotaExceededError(
                f"The budget of ${format_dollars(limit_nanodollars).rstrip('0').rstrip('.')} for {status.month} is "
                "spent; requests are served again next month, or when the operator raises it."
            )
        self._reserved[status.month, tenant_id] += estimate_nanodollars
        return Reservation(tenant_id, status.month, estimate_nanodollars)

    def settle(self, reservation: Reservation, cost_nanodollars: int) -> None:
        """A request has ended and cost so much, perhaps nothing. A second time changes nothing."""
        if reservation.is_settled:
            return
        reservation.is_settled = True
        key = reservation.month, reservation.tenant_id
        self._reserved[key] -= reservation.nanodollars
        if not self._reserved[key]:
            del self._reserved[key]
        self._own[key] += cost_nanodollars

    def refresh(self, month: str, others: Mapping[str, int]) -> None:
        """What tenants have spent in a month by way of other routers: `Ledger.read_month`.

        Routers' sums only grow, so that an answer that comes late is told by being smaller.
        """
        for tenant_id, nanodollars in others.items():
            key = month, tenant_id
            self._others[key] = max(nanodollars, self._others.get(key, 0))

    def forget_before(self, month: str) -> None:
        """Drop what is known of earlier months, but for what is in flight in them."""
        for amounts in (self._own, self._others):
            for key in [key for key in amounts if key[0] < month]:
                del amounts[key]

    def status(self, tenant_id: str, *, limit_nanodollars: int | None, now_ns: int) -> BudgetStatus:
        """How a tenant stands in the month of `now_ns`."""
        month = month_of(now_ns)
        key = month, tenant_id
        spent = self._own[key] + self._others.get(key, 0)
        reserved = self._reserved[key]
        if limit_nanodollars is None or 100 * spent < self.warn_percent * limit_nanodollars:
            state = BudgetState.OK
        else:
            state = BudgetState.WARNING if spent < limit_nanodollars else BudgetState.EXHAUSTED
        return BudgetStatus(month, limit_nanodollars, spent, reserved, state)
