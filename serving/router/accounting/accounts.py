"""One router's side of the money: prices, budgets, rate limits on tokens, and the ledger that keeps the rows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from typing import Protocol

from serving.billing.budgets import Budgets, BudgetState, Reservation
from serving.billing.database import ReplicaLife
from serving.billing.journal_room import REFUSED_FOR_ROOM
from serving.billing.ledger import Ledger
from serving.billing.open_requests import OpenRequest
from serving.billing.periods import month_of
from serving.billing.prices import Price, PriceBook
from serving.billing.records import RequestRecord, TokenCounts
from serving.cluster.directory import EMPTY, ReplicaRecord, Snapshot
from serving.errors import OverloadedError
from serving.router.access.limits import TenantLimits
from serving.router.accounting.token_bounds import TokenBounds
from serving.router.accounting.usage_polling import FetchUsage, poll_counts
from serving.router.request.parsing import RoutedRequest
from serving.settings.stack import Settings
from serving.settings.tenants import Identity
from serving.telemetry.gauges import read_budgets, read_ledger
from serving.telemetry.logs import log_request
from serving.telemetry.router_metrics import Reading, RouterMetrics

logger = logging.getLogger(__name__)

_USED_HEADER = b"x-budget-used-percent"
_NANO_DIGITS = 9
_FIRST_READ_S = 2.0
"""How long a starting router waits for a database to be ready."""


class Journal(Protocol):
    """Keeps the rows of requests; `Ledger` is one."""

    def open(self, request: OpenRequest) -> None:
        """A replica gets the request next; `record` will close it."""

    def record(self, record: RequestRecord) -> None:
        """The request has ended."""


class Accounts:
    """Prices, budgets and the ledger of one router. Without a ledger nothing outlives the process."""

    def __init__(
        self,
        settings: Settings,
        router_id: str,
        limits: TenantLimits,
        metrics: RouterMetrics,
        fetch_usage: FetchUsage,
        ledger: Ledger | None = None,
        journal: Journal | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            settings: the whole of them.
            router_id: of this life of the router, as rows show it.
            limits: get the tokens that requests have used.
            metrics: count the requests that have ended.
            fetch_usage: fetches a replica's counts for a request.
            ledger: prices, budgets and rows are kept there.
            journal: gets the rows of requests instead of the ledger.
        """
        self.router_id = router_id
        self.limits = limits
        self.ledger = ledger
        self.journal: Journal | None = journal or ledger
        self._metrics = metrics
        self._fetch_usage = fetch_usage
        self._snapshot = EMPTY
        self._prices = build_price_book(settings)
        self._refresh_s = settings.billing.budget.refresh_s
        self._budgets = Budgets(settings.billing.budget.warn_percent)
        self._known: dict[str, int] = {}
        """Monthly budgets of the tenants seen so far, in nanodollars."""
        self._is_spending_known = ledger is None
        self._refreshing: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()

    @property
    def num_settling(self) -> int:
        """Requests that have ended and whose tokens are still being asked for."""
        return len(self._settling)

    async def start(self) -> None:
        """Start the ledger, and read what tenants have spent if its database is ready.

        Raises:
            OSError: the ledger's directory cannot be used.
        """
        if self.ledger is not None:
            await self.ledger.start()
            # Before the first request, if the database is available: a budget may be spent already.
            if await self.ledger.flush(_FIRST_READ_S):
                await self._refresh(self.ledger)
            self._refreshing = asyncio.create_task(self._refresh_forever())

    async def close(self) -> None:
        """Wait for the counts that are still asked for. Rows go to the database if that is quick; they are on disk."""
        if self._settling:
            await asyncio.wait(self._settling)
        if self._refreshing is not None:
            self._refreshing.cancel()
        if self.ledger is not None:
            await self.ledger.close()

    def find_price(self, model: str, tenant_id: str, arrived_ns: int) -> Price:
        return self._prices.find(model, tenant_id, arrived_ns)

    def check_room(self, identity: Identity) -> None:
        """Check that the ledger will have room for a request's row.

        Raises:
            RateLimitError: the rows that wait for the database include the tenant's whole share.
            OverloadedError: the ledger is full.
        """
        if self.ledger is not None:
            self.ledger.check_room(identity.tenant_id, is_one_of_many=bool(identity.key_id))

    def reserve(
        self, request: RoutedRequest, bounds: TokenBounds, price: Price, identity: Identity, arrived_ns: int
    ) -> tuple[RoutedRequest, Reservation]:
        """Reserve the most that a request can cost: see `RequestAccount.reserve`."""
        tenant_id, limit = identity.tenant_id, _limit(identity)
        answer = bounds.longest_answer
        if limit is not None:
            self._known[tenant_id] = limit
            if not self._is_spending_known:
                raise OverloadedError(
                    "What this key's tenant has spent this month cannot be read yet; try again shortly.",
                    self._refresh_s,
                    code="budget_unknown",
                )
            payable = self._count_payable(tenant_id, arrived_ns, price, limit, bounds)
            if request.max_tokens_field is None and payable is not None and (answer is None or payable < answer):
                answer = max(1, payable)  # a budget that does not pay for a single token is refused below
                request = request.with_max_tokens(answer)
        most = price.most_nanodollars(
            num_prompt_tokens=bounds.prompt.most,
            num_completion_tokens=(answer or 0) * bounds.num_choices,
            num_image_tokens=bounds.num_image_tokens,
        )
        return request, self._budgets.reserve(
            tenant_id,
            limit_nanodollars=limit,
            most_nanodollars=most,
            now_ns=arrived_ns,
            param=request.max_tokens_field,
        )

    def has_budget(self, identity: Identity) -> bool:
        """Whether a tenant has a budget."""
        return _limit(identity) is not None

    def _count_payable(
        self, tenant_id: str, arrived_ns: int, price: Price, limit: int, bounds: TokenBounds
    ) -> int | None:
        """How many tokens of each answer the rest of the budget pays for; None for any number."""
        status = self._budgets.status(tenant_id, limit_nanodollars=limit, now_ns=arrived_ns)
        payable = price.count_payable(
            status.left_nanodollars or 0,
            num_prompt_tokens=bounds.prompt.most,
            num_image_tokens=bounds.num_image_tokens,
        )
        return None if payable is None else payable // bounds.num_choices

    async def poll_counts(self, replica: ReplicaRecord, request_id: str) -> TokenCounts | None:
        """What a replica counted for a request that has ended; None if it cannot say."""
        return await poll_counts(self._fetch_usage, replica, request_id)

    def settle_later(self, settling: Coroutine[object, object, None]) -> None:
        """Settle a request in a task of its own, since its replicas have to be asked first."""
        task = asyncio.get_running_loop().create_task(settling)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    def settle(
        self, identity: Identity, record: RequestRecord, reservation: Reservation | None, reserved_tokens: int
    ) -> None:
        """A request has ended: what was reserved for it becomes what it used, and its row is written and counted."""
        used = record.tokens.num_prompt_tokens + record.tokens.num_completion_tokens
        self.limits.settle(identity, reserved_tokens, used, time.monotonic())
        if reservation is not None:
            self._budgets.settle(reservation, record.cost_nanodollars)
        if self.journal is not None and record.error_code not in REFUSED_FOR_ROOM:
            self.journal.record(record)
        self._metrics.count(record)
        log_request(record)

    def headers(self, identity: Identity) -> list[tuple[bytes, bytes]]:
        """Headers that warn a tenant whose budget is nearly spent; none before that."""
        limit = _limit(identity)
        if limit is None:
            return []
        status = self._budgets.status(identity.tenant_id, limit_nanodollars=limit, now_ns=time.time_ns())
        return [] if status.state is BudgetState.OK else [(_USED_HEADER, b"%d" % status.used_percent)]

    def see_replicas(self, snapshot: Snapshot) -> None:
        """Note the replicas that exist now: they cost money whether they work or not."""
        self._snapshot = snapshot
        if self.ledger is not None:
            if snapshot.version != EMPTY.version:
                self.ledger.fetch_counts = self._fetch_counts
            now_ns = time.time_ns()
            self.ledger.see_replicas(
                ReplicaLife(record.replica_id, record.model, now_ns, now_ns) for record in snapshot.records
            )

    def read_gauges(self) -> Iterator[Reading]:
        """The catalogue's gauges of budgets and the ledger."""
        if self.ledger is not None:
            yield from read_ledger(self.ledger)
        yield from read_budgets(self._budgets, self._known, time.time_ns())

    async def _fetch_counts(self, replica_id: str, request_id: str) -> TokenCounts | None:
        for replica in self._snapshot.records:
            if replica.replica_id == replica_id:
                return await self.poll_counts(replica, request_id)
        return None

    async def _refresh_forever(self) -> None:
        """Keep reading what tenants have spent through other routers and in earlier lives of this one."""
        assert self.ledger is not None
        while True:
            await asyncio.sleep(self._refresh_s)
            await self._refresh(self.ledger)

    async def _refresh(self, ledger: Ledger) -> None:
        month = month_of(time.time_ns())
        try:
            self._budgets.refresh(month, await ledger.read_month(month))
            self._budgets.forget_before(month)
            self._is_spending_known = True
        except Exception as error:  # noqa: BLE001  # whatever a database driver raises: the last figures remain in force
            logger.warning("what tenants have spent elsewhere cannot be read: %s", error)


def build_price_book(settings: Settings) -> PriceBook:
    """The price lists of all models."""
    return PriceBook.from_settings({name: model.price for name, model in settings.models.items()})


def build_ledger(settings: Settings, router_id: str) -> Ledger:
    """The ledger of one router process."""
    return Ledger(settings.billing, router_id, build_price_book(settings))


def _limit(identity: Identity) -> int | None:
    budget = identity.tenant.monthly_budget
    return None if budget is None else int(budget.scaleb(_NANO_DIGITS))
