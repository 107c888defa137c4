"""The money of one request, from its arrival to its row in the ledger.

    set_price    the body has been understood: what the request's tokens cost
    reserve      the most that it can cost is held back from its tenant's budget, its tokens from their rate limit
    sent_to      a replica gets it: noted on disk first, since what it computes counts even if this router dies
    complete     the whole answer has arrived: its row is in the journal when this returns, before its last bytes leave
    finish       the request has ended: what was reserved becomes what was used, and the row is written

The row of a request that was completed is written by `complete`; `finish` then changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serving.billing.budgets import Reservation
from serving.billing.open_requests import OpenRequest
from serving.billing.records import LostTry, Outcome, RequestRecord, TokenCounts
from serving.cluster.directory import ReplicaRecord
from serving.router.accounting.accounts import Accounts
from serving.router.accounting.answer_usage import UsageNotes
from serving.router.accounting.token_bounds import TokenBounds
from serving.router.request.parsing import RoutedRequest
from serving.settings.tenants import Identity

if TYPE_CHECKING:  # it imports the whole SDK, which most stacks do without
    from serving.telemetry.traces import RequestTrace

CLIENT_CLOSED = 499
"""nginx's status for a client that left before its answer; only the ledger shows it."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What is known of a request before its body is read."""

    request_id: str
    """Unique; engines and the ledger know the request by it."""
    route: str
    identity: Identity
    arrived_ns: int
    credit_nanodollars: int = 0
    """To be deducted from its price, as an OCR service of this stack has signed."""
    trace: RequestTrace | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended, as its client saw it."""

    outcome: Outcome
    status: int
    error_code: str = ""
    first_byte_ns: int = 0

    @classmethod
    def of_whole(cls, status: int, first_byte_ns: int) -> Ending:
        """A complete answer."""
        return cls(Outcome.COMPLETED, status, "", first_byte_ns)


class RequestAccount:
    """Keeps one request's reservation, the replicas that have worked for it, and its row."""

    __slots__ = (
        "_accounts",
        "_is_finished",
        "_notes",
        "_queue_wait_ns",
        "_request",
        "_reservation",
        "_reserved_tokens",
        "_tried",
        "_uncounted",
        "context",
    )

    def __init__(self, accounts: Accounts, context: RequestContext) -> None:
        self._accounts = accounts
        self.context = context
        self._request: RoutedRequest | None = None
        self._notes: UsageNotes | None = None
        self._reservation: Reservation | None = None
        self._reserved_tokens = 0
        self._queue_wait_ns = 0
        self._tried: list[ReplicaRecord] = []
        self._uncounted: list[ReplicaRecord] = []
        """Those of them that may have generated something and have not said how much."""
        self._is_finished = False

    @property
    def notes(self) -> UsageNotes:
        """What is added to the answer's usage and read from it. Only of a request whose price is set."""
        assert self._notes is not None
        return self._notes

    @property
    def tokens(self) -> TokenCounts | None:
        """As the engine counted them; None until it has said so."""
        return self._notes.tokens if self._notes is not None else None

    @property
    def has_reservation(self) -> bool:
        return self._reservation is not None

    @property
    def num_tries(self) -> int:
        """Replicas that the request was sent to."""
        return len(self._tried)

    def set_price(self, request: RoutedRequest) -> None:
        """The body has been understood: look up what the request's tokens cost."""
        context = self.context
        price = self._accounts.find_price(request.model, context.identity.tenant_id, context.arrived_ns)
        self._request = request
        self._notes = UsageNotes(price, credit_nanodollars=context.credit_nanodollars)

    def reserve(self, request: RoutedRequest, bounds: TokenBounds) -> RoutedRequest:
        """Reserve the most that the request can cost.

        Returns:
            The request as it may be sent: an answer that its client has not bounded is bounded to what the rest of the
            budget pays for.

        Raises:
            QuotaExceededError: the tenant's month is spent, or what is left of it does not pay for this request.
            RateLimitError: running requests have reserved what it would need.
            OverloadedError: what is left of the budget is unknown, since the ledger's database has not been read yet.
        """
        context, price = self.context, self.notes.price
        bounded, self._reservation = self._accounts.reserve(
            request, bounds, price, context.identity, context.arrived_ns
        )
        return bounded

    def reserve_tokens(self, num_tokens: int) -> None:
        """Take the tokens that the request is expected to use from its tenant's tokens per minute.

        Raises:
            RateLimitError: this minute's are used up.
        """
        self._accounts.limits.reserve_tokens(self.context.identity, num_tokens, time.monotonic())
        self._reserved_tokens = num_tokens

    def queued(self, wait_s: float) -> None:
        """The request has been placed on a replica after so long a wait."""
        self._queue_wait_ns = round(wait_s * 1e9)

    def sent_to(self, replica: ReplicaRecord, modes: tuple[str, ...]) -> None:
        """The replica, which reads the images in these modes, gets the request as soon as this returns."""
        self._tried.append(replica)
        self._uncounted.append(replica)
        self._note_open()
        self.notes.image_modes = modes

    def refused(self) -> None:
        """The last replica has not run the request: it refused it, or was never connected to."""
        self._uncounted.pop()

    def hand_over(self) -> None:
        """The request is served as something else, which is accounted for elsewhere: it has no row of its own."""
        self._is_finished = True

    def complete(self, status: int, first_byte_ns: int) -> None:
        """The whole answer has arrived: its row is in the journal when this returns.

        An answer that does not say what it used has its row when its engine has been asked. One that came after tries
        on replicas which are still to be asked is promised: the note on disk has its row, which can change only by what
        those tries used.
        """
        tokens = self.tokens
        if tokens is None:
            return
        ending = Ending.of_whole(status, first_byte_ns)
        self._uncounted.pop()
        if self._uncounted:
            self._note_open(self._build_record(ending, time.time_ns(), tokens))
        self.finish(ending)

    def finish(self, ending: Ending) -> None:
        """The request has ended; returns at once. One that was finished before stays as it was."""
        if self._is_finished:
            return
        self._is_finished = True
        ended_ns = time.time_ns()
        if self._uncounted:
            self._accounts.settle_later(self._finish_when_counted(ending, ended_ns))
        else:
            self._settle(self._build_record(ending, ended_ns, self.tokens or TokenCounts()))

    async def _finish_when_counted(self, ending: Ending, ended_ns: int) -> None:
        """Ask the replicas that have not said what they counted, and settle."""
        request_id = self.context.request_id
        counts = await asyncio.gather(*(self._accounts.poll_counts(replica, request_id) for replica in self._uncounted))
        tries = list(zip(self._uncounted, counts, strict=True))
        last = self.tokens
        if self._uncounted[-1].replica_id == self._tried[-1].replica_id:
            counted_last = tries.pop()[1]  # the same as in the stream, if that broke after its usage
            last = last or counted_last
        lost = tuple(
            LostTry(replica.replica_id, counted.num_prompt_tokens, counted.num_completion_tokens)
            for replica, counted in tries
            if counted is not None
        )
        is_estimated = last is None
        if last is None:
            # The engine is gone and its count with it; what was certainly generated is what reached the client.
            last = TokenCounts(num_completion_tokens=self._notes.num_frames if self._notes is not None else 0)
        record = self._build_record(ending, ended_ns, last)
        wasted = record.num_wasted_tokens + sum(each.num_completion_tokens for each in lost)
        self._settle(replace(record, is_estimated=is_estimated, num_wasted_tokens=wasted, lost_tries=lost))

    def _settle(self, record: RequestRecord) -> None:
        self._accounts.settle(self.context.identity, record, self._reservation, self._reserved_tokens)
        if self.context.trace is not None:
            self.context.trace.end(record)

    def _note_open(self, promised: RequestRecord | None = None) -> None:
        """Note the request on disk, should this router not live to write its row."""
        journal, request, context = self._accounts.journal, self._request, self.context
        if journal is None:
            return
        assert request is not None
        journal.open(
            OpenRequest(
                request_id=context.request_id,
                tenant_id=context.identity.tenant_id,
                key_id=context.identity.key_id,
                model=request.model,
                route=context.route,
                price_version=self.notes.price.version,
                router_id=self._accounts.router_id,
                arrived_ns=context.arrived_ns,
                num_pages=len(request.image_sizes),
                priority=context.identity.tenant.priority,
                is_stream=request.is_stream,
                num_tries=len(self._tried),
                replica_ids=tuple(replica.replica_id for replica in self._uncounted),
                promised=promised,
            )
        )

    def _build_record(self, ending: Ending, ended_ns: int, tokens: TokenCounts) -> RequestRecord:
        context, request, notes = self.context, self._request, self._notes
        cost, credited = notes.bill(tokens, ending.outcome) if notes is not None else (0, 0)
        return RequestRecord(
            request_id=context.request_id,
            tenant_id=context.identity.tenant_id,
            key_id=context.identity.key_id,
            model=request.model if request is not None else "",
            route=context.route,
            outcome=ending.outcome,
            status=ending.status,
            error_code=ending.error_code,
            modes=notes.image_modes if notes is not None else (),
            num_pages=len(request.image_sizes) if request is not None else 0,
            tokens=tokens,
            num_wasted_tokens=tokens.num_completion_tokens if ending.outcome is Outcome.FAILED else 0,
            cost_nanodollars=cost,
            price_version=notes.price.version if notes is not None else "",
            replica_id=self._tried[-1].replica_id if self._tried else "",
            num_tries=len(self._tried),
            finish_reason=notes.finish_reason if notes is not None else "",
            arrived_ns=context.arrived_ns,
            first_byte_ns=ending.first_byte_ns,
            ended_ns=ended_ns,
            queue_wait_ns=self._queue_wait_ns,
            priority=context.identity.tenant.priority,
            is_stream=request is not None and request.is_stream,
            router_id=self._accounts.router_id,
            credit_nanodollars=credited,
        )
