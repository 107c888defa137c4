"""A router's side of the books: what requests cost, what tenants have left, and the ledger that keeps it all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

from serving.billing.budgets import Budgets, BudgetState
from serving.billing.database import ReplicaLife
from serving.billing.journal_room import REFUSED_FOR_ROOM
from serving.billing.ledger import Ledger
from serving.billing.open_requests import OpenRequest
from serving.billing.periods import month_of
from serving.billing.prices import Price, PriceBook
from serving.billing.records import RequestRecord, TokenCounts
from serving.cluster.directory import EMPTY, Snapshot
from serving.errors import OverloadedError
from serving.router.accounting.metering import FetchUsage, RequestContext, poll_counts
from serving.router.accounting.token_bounds import TokenBounds
from serving.settings.stack import Settings
from serving.settings.tenants import Identity
from serving.telemetry.gauges import read_budgets, read_ledger
from serving.telemetry.router_metrics import Reading

logger = logging.getLogger(__name__)

_USED_HEADER = b"x-budget-used-percent"
_NANO_DIGITS = 9
_FIRST_READ_S = 2.0
"""How long a router waits at its start for a database to be ready."""


class Accounts:
    """Prices, budgets and the ledger of one router. Without a ledger (`ledger=None`) nothing outlives the process."""

    def __init__(self, settings: Settings, ledger: Ledger | None, fetch_usage: FetchUsage) -> None:
        """`fetch_usage` tells what came of requests that routers left open when they died."""
        self.ledger = ledger
        self._fetch_usage = fetch_usage
        self._snapshot = EMPTY
        self._prices = build_price_book(settings)
        self._refresh_s = settings.billing.budget.refresh_s
        self._budgets = Budgets(settings.billing.budget.warn_percent)
        self._known: dict[str, int] = {}
        """Monthly budgets of the tenants that were here, in nanodollars."""
        self._is_spending_known = ledger is None
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises:
        OSError: the ledger's directory cannot be used.
        """
        if self.ledger is not None:
            await self.ledger.start()
            # Before the first request, if the database is there: a budget may be spent already.
            if await self.ledger.flush(_FIRST_READ_S):
                await self._refresh(self.ledger)
            self._refreshing = asyncio.create_task(self._refresh_forever())

    async def close(self) -> None:
        """What is recorded goes to the database if that is quick; it is on disk anyway."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        if self.ledger is not None:
            await self.ledger.close()

    def find_price(self, model: str, tenant_id: str, arrived_ns: int) -> Price:
        return self._prices.find(model, tenant_id, arrived_ns)

    def check_room(self, identity: Identity) -> None:
        """Whether the ledger will have room for a request's record.

        Raises:
            RateLimitError: what the ledger's database lacks is the tenant's share.
            OverloadedError: the ledger is full.
        """
        if self.ledger is not None:
            self.ledger.check_room(identity.tenant_id, is_one_of_many=bool(identity.key_id))

    def reserve(self, context: RequestContext, bounds: TokenBounds) -> None:
        """Hold back the most that a request can cost. An answer that its client has put no bound on is bounded to what
        the rest of the budget pays for.

        Raises:
            QuotaExceededError: the tenant's month is spent, or what is left of it does not pay for this request.
            RateLimitError: running requests have reserved what it would need.
            OverloadedError: nobody knows yet what is left of it, since the ledger's database has not been read.
        """
        request, notes = context.understood()
        price, tenant_id = notes.price, context.identity.tenant_id
        limit = _limit(context.identity)
        answer = bounds.longest_answer
        if limit is not None:
            self._known[tenant_id] = limit
            if not self._is_spending_known:
                raise OverloadedError(
                    "What this key's tenant has spent this month cannot be read yet; try again shortly.",
                    self._refresh_s,
                    code="budget_unknown",
                )
            payable = self._count_payable(context, limit, bounds)
            if request.max_tokens_field is None and payable is not None and (answer is None or payable < answer):
                answer = max(1, payable)  # what does not pay for a single token is refused below
                context.request = request = request.with_max_tokens(answer)
        most = price.most_nanodollars(
            num_prompt_tokens=bounds.prompt.most,
            num_completion_tokens=(answer or 0) * bounds.num_choices,
            num_image_tokens=bounds.num_image_tokens,
        )
        context.reservation = self._budgets.reserve(
            tenant_id,
            limit_nanodollars=limit,
            most_nanodollars=most,
            now_ns=context.arrived_ns,
            param=request.max_tokens_field,
        )
        if self.ledger is not None:
            context.on_try = self._open

    def has_budget(self, identity: Identity) -> bool:
        """Whether what a tenant spends is limited."""
        return _limit(identity) is not None

    def _count_payable(self, context: RequestContext, limit: int, bounds: TokenBounds) -> int | None:
        """Tokens of each answer that the rest of the budget pays for; None for any number."""
        status = self._budgets.status(context.identity.tenant_id, limit_nanodollars=limit, now_ns=context.arrived_ns)
        payable = context.understood()[1].price.count_payable(
            status.left_nanodollars or 0,
            num_prompt_tokens=bounds.prompt.most,
            num_image_tokens=bounds.num_image_tokens,
        )
        return None if payable is None else payable // bounds.num_choices

    def settle(self, context: RequestContext, record: RequestRecord) -> None:
        """A request has ended: its reservation becomes its cost, and its record goes into the ledger."""
        if context.reservation is not None:
            self._budgets.settle(context.reservation, record.cost_nanodollars)
        if self.ledger is not None and record.error_code not in REFUSED_FOR_ROOM:
            self.ledger.record(record)

    def headers(self, identity: Identity) -> list[tuple[bytes, bytes]]:
        """Tells a tenant that little of its budget is left; nothing before."""
        limit = _limit(identity)
        if limit is None:
            return []
        status = self._budgets.status(identity.tenant_id, limit_nanodollars=limit, now_ns=time.time_ns())
        return [] if status.state is BudgetState.OK else [(_USED_HEADER, b"%d" % status.used_percent)]

    def see_replicas(self, snapshot: Snapshot) -> None:
        """Replicas cost money while they are there, whether they work or not."""
        self._snapshot = snapshot
        if self.ledger is not None:
            if snapshot.version != EMPTY.version:
                self.ledger.fetch_counts = self._fetch_counts
            now_ns = time.time_ns()
            self.ledger.see_replicas(
                ReplicaLife(record.replica_id, record.model, now_ns, now_ns) for record in snapshot.records
            )

    def read_gauges(self) -> Iterator[Reading]:
        """The catalogue's gauges of money and books."""
        if self.ledger is not None:
            yield from read_ledger(self.ledger)
        yield from read_budgets(self._budgets, self._known, time.time_ns())

    def promise(self, context: RequestContext, record: RequestRecord) -> None:
        """A whole answer is about to leave, and tries of it that others lost must still be asked for."""
        if self.ledger is not None:
            self._open(context, record)

    def _open(self, context: RequestContext, promised: RequestRecord | None = None) -> None:
        """Note on disk that a replica gets this request, should this router not live to see its end."""
        assert self.ledger is not None
        request, notes = context.understood()
        self.ledger.open(
            OpenRequest(
                request_id=context.request_id,
                tenant_id=context.identity.tenant_id,
                key_id=context.identity.key_id,
                model=request.model,
                route=context.route,
                price_version=notes.price.version,
                router_id=self.ledger.router_id,
                arrived_ns=context.arrived_ns,
                num_pages=len(request.image_sizes),
                priority=context.identity.tenant.priority,
                is_stream=request.is_stream,
                num_tries=len(context.tried),
                replica_ids=tuple(replica.replica_id for replica in context.uncounted),
                promised=promised,
            )
        )

    async def _fetch_counts(self, replica_id: str, request_id: str) -> TokenCounts | None:
        for replica in self._snapshot.records:
            if replica.replica_id == replica_id:
                return await poll_counts(self._fetch_usage, replica, request_id)
        return None

    async def _refresh_forever(self) -> None:
        """Learn what tenants have spent by way of other routers, and in earlier lives of this one."""
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
        except Exception as error:  # noqa: BLE001  # whatever a database driver raises: the last figures stand
            logger.warning("what tenants have spent elsewhere cannot be read: %s", error)


def build_price_book(settings: Settings) -> PriceBook:
    """The price lists of all models."""
    return PriceBook.from_settings({name: model.price for name, model in settings.models.items()})


def build_ledger(settings: Settings, router_id: str) -> Ledger:
    """The ledger of one life of a router."""
    return Ledger(settings.billing, router_id, build_price_book(settings))


def _limit(identity: Identity) -> int | None:
    budget = identity.tenant.monthly_budget
    return None if budget is None else int(budget.scaleb(_NANO_DIGITS))
