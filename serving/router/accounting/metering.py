"""What each request came to: followed while it runs, completed by its engine when the answer did not say, recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from serving.billing.budgets import Reservation
from serving.billing.prices import Price
from serving.billing.records import LostTry, Outcome, RequestRecord, TokenCounts
from serving.cluster.directory import ReplicaRecord
from serving.errors import ServingError
from serving.router.accounting.answer_usage import UsageNotes
from serving.router.request.parsing import RoutedRequest
from serving.settings.tenants import Identity

if TYPE_CHECKING:  # it imports the whole SDK, which most stacks do without
    from serving.telemetry.traces import RequestTrace

CLIENT_CLOSED = 499
"""nginx's status for a client that left before its answer; nobody sees it but the ledger."""

_POLL_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses between questions: an engine notices at its next step that a request has been aborted."""


@dataclass(slots=True)
class RequestContext:
    """One request of one tenant, from its arrival to its end."""

    request_id: str
    """Unique; what engines and the ledger know it by."""
    route: str
    identity: Identity
    arrived_ns: int
    request: RoutedRequest | None = None
    """Set when the body was understood."""
    notes: UsageNotes | None = None
    tried: list[ReplicaRecord] = field(default_factory=list)
    """Replicas that were tried, in turn."""
    uncounted: list[ReplicaRecord] = field(default_factory=list)
    """Those that may have generated something for it and have not said how much."""
    queue_wait_ns: int = 0
    reservation: Reservation | None = None
    """What its tenant's budget holds back for it."""
    on_try: Callable[[RequestContext], None] = lambda context: None
    """Called before a replica, the last of `tried`, is sent the request."""
    reserved_tokens: int = 0
    """Taken from the tenant's tokens per minute before its real use was known."""
    trace: RequestTrace | None = None
    credit_nanodollars: int = 0
    """That its client may have taken off the price."""
    is_finished: bool = False
    """Whether its end has been taken down: nothing that comes after it changes the record."""

    @property
    def tokens(self) -> TokenCounts | None:
        """As its engine counted them; None until it has said so."""
        return self.notes.tokens if self.notes is not None else None

    def understood(self) -> tuple[RoutedRequest, UsageNotes]:
        """The request and its notes, of a request whose body was understood."""
        assert self.request is not None
        assert self.notes is not None
        return self.request, self.notes

    def start(self, request: RoutedRequest, price: Price) -> None:
        """The body was understood."""
        self.request = request
        self.notes = UsageNotes(price, credit_nanodollars=self.credit_nanodollars)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended, as its client saw it."""

    outcome: Outcome
    status: int
    error_code: str = ""
    first_byte_ns: int = 0

    @classmethod
    def of_whole(cls, status: int, first_byte_ns: int) -> Ending:
        """An answer of which nothing is missing."""
        return cls(Outcome.COMPLETED, status, "", first_byte_ns)

    @classmethod
    def from_error(cls, error: ServingError, context: RequestContext, status: int, first_byte_ns: int) -> Ending:
        """A request that no replica got was refused; what failed later failed."""
        outcome = Outcome.FAILED if context.tried and error.http_status >= 500 else Outcome.REFUSED
        return cls(outcome, status or error.http_status, error.code or "", first_byte_ns)


FetchUsage = Callable[[ReplicaRecord, str], Awaitable[dict[str, Any] | None]]
"""Asks a replica what its engine counted for a request id; None when it cannot tell."""


class Accountant:
    """Makes one record of every request: at once if its tokens are known, else when its engine has reported them."""

    def __init__(
        self,
        fetch_usage: FetchUsage,
        on_record: Callable[[RequestContext, RequestRecord], None],
        router_id: str = "",
        on_promise: Callable[[RequestContext, RequestRecord], None] = lambda context, record: None,
    ) -> None:
        """Args:
        fetch_usage: asks a replica what it counted.
        on_record: gets the record of every context, once.
        router_id: stands in the records.
        on_promise: gets the record of a whole answer that is about to leave while earlier tries of it are still asked
            for; what is recorded later differs from it in those only.
        """
        self._fetch_usage = fetch_usage
        self._router_id = router_id
        self._on_record = on_record
        self._on_promise = on_promise
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Calls that have ended and whose tokens are not known yet."""
        return len(self._asking)

    def finish_whole(self, context: RequestContext, ending: Ending) -> None:
        """Record a request whose answer is whole, before its last bytes leave: on disk when this returns."""
        if context.tokens is None:
            return  # its engine must be asked first
        context.uncounted.pop()
        if context.uncounted:
            record = _build_record(context, ending, time.time_ns(), context.tokens)
            self._on_promise(context, replace(record, router_id=self._router_id))
        self.finish(context, ending)

    def finish(self, context: RequestContext, ending: Ending) -> None:
        """Take a request that has ended; returns at once. One that was taken before stays as it was."""
        if context.is_finished:
            return
        context.is_finished = True
        ended_ns = time.time_ns()
        if not context.uncounted:
            record = _build_record(context, ending, ended_ns, context.tokens or TokenCounts())
            self._on_record(context, replace(record, router_id=self._router_id))
            return
        task = asyncio.get_running_loop().create_task(self._complete(context, ending, ended_ns))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def close(self) -> None:
        """Wait for the calls that are still open."""
        if self._asking:
            await asyncio.wait(self._asking)

    async def _complete(self, context: RequestContext, ending: Ending, ended_ns: int) -> None:
        counted = await asyncio.gather(
            *(poll_counts(self._fetch_usage, replica, context.request_id) for replica in context.uncounted)
        )
        tries = list(zip(context.uncounted, counted, strict=True))
        last = context.tokens
        if context.uncounted[-1].replica_id == context.tried[-1].replica_id:
            counted_last = tries.pop()[1]  # the same as was told in the stream, if that broke behind its usage
            last = last or counted_last
        lost = tuple(
            LostTry(replica.replica_id, counts.num_prompt_tokens, counts.num_completion_tokens)
            for replica, counts in tries
            if counts is not None
        )
        is_estimated = last is None
        if last is None:
            # The engine is gone and its count with it; what certainly came is what reached the client.
            last = TokenCounts(num_completion_tokens=context.notes.num_frames if context.notes is not None else 0)
        record = _build_record(context, ending, ended_ns, last)
        wasted = record.num_wasted_tokens + sum(each.num_completion_tokens for each in lost)
        record = replace(record, router_id=self._router_id, is_estimated=is_estimated)
        self._on_record(context, replace(record, num_wasted_tokens=wasted, lost_tries=lost))


async def poll_counts(fetch_usage: FetchUsage, replica: ReplicaRecord, request_id: str) -> TokenCounts | None:
    """What a replica counted for a request that has ended, or is about to; None when it cannot tell."""
    for pause_s in _POLL_S:
        found = await fetch_usage(replica, request_id)
        if found is None:
            return None
        if found.get("is_finished"):
            return TokenCounts(
                num_prompt_tokens=int(found["prompt_tokens"]),
                num_image_tokens=int(found["image_tokens"]),
                num_cached_tokens=int(found["cached_tokens"]),
                num_completion_tokens=int(found["completion_tokens"]),
            )
        await asyncio.sleep(pause_s)
    return None


def _build_record(context: RequestContext, ending: Ending, ended_ns: int, tokens: TokenCounts) -> RequestRecord:
    notes = context.notes
    cost, credited = notes.bill(tokens, ending.outcome) if notes is not None else (0, 0)
    return RequestRecord(
        request_id=context.request_id,
        tenant_id=context.identity.tenant_id,
        key_id=context.identity.key_id,
        model=context.request.model if context.request is not None else "",
        route=context.route,
        outcome=ending.outcome,
        status=ending.status,
        error_code=ending.error_code,
        modes=notes.image_modes if notes is not None else (),
        num_pages=len(context.request.image_sizes) if context.request is not None else 0,
        tokens=tokens,
        num_wasted_tokens=tokens.num_completion_tokens if ending.outcome is Outcome.FAILED else 0,
        cost_nanodollars=cost,
        price_version=notes.price.version if notes is not None else "",
        replica_id=context.tried[-1].replica_id if context.tried else "",
        num_tries=len(context.tried),
        finish_reason=notes.finish_reason if notes is not None else "",
        arrived_ns=context.arrived_ns,
        first_byte_ns=ending.first_byte_ns,
        ended_ns=ended_ns,
        queue_wait_ns=context.queue_wait_ns,
        priority=context.identity.tenant.priority,
        is_stream=context.request is not None and context.request.is_stream,
        credit_nanodollars=credited,
    )
