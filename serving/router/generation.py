"""A request that generates, from top to bottom: identify, hold, parse, reserve, place, send, settle.

    identify   whose request it is, and the id that engines and the ledger know it by        -> RequestContext
    hold       one of the tenant's requests and memory for the body; on every way out everything that the request
               holds is given back or, if it was used, settled                               -> Allowance
    parse      the body, checked, with remote images fetched                                 -> RoutedRequest
    reserve    the tenant's budget and tokens per minute, of what the request may take       -> WorkEstimate
    place      a place on a replica, queueing for one if all are busy                        -> Slot
    send       to that replica, or the next one if it fails before the client has got a byte

Values that steps pass on are frozen. What changes is kept by three objects: the request's money by `RequestAccount`,
its place by `Slot`, what its client has received by `Reply`. A complete answer's row is in the journal before its last
bytes leave: `_try` does one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from serving.billing.credits import SERVICE_MARK
from serving.billing.records import Outcome
from serving.errors import (
    EngineError,
    InvalidRequestError,
    NoReplicaError,
    ReplicaConnectError,
    ReplicaTimeoutError,
    ServingError,
)
from serving.http.bodies import ClientGoneError, HeldBody, decode_json, discard_body, read_body, replay_body
from serving.http.disconnects import ClientPresence
from serving.http.reply import Reply
from serving.router.access.auth import check_model_allowed
from serving.router.access.control import AccessControl, Incoming
from serving.router.access.limits import COUNTED_DOCUMENT, GENERATION
from serving.router.accounting.accounts import Accounts
from serving.router.accounting.request_account import CLIENT_CLOSED, Ending, RequestAccount, RequestContext
from serving.router.accounting.token_bounds import bound_tokens
from serving.router.relay.document_chat import DocumentReply, DocumentsFoundError, build_reading
from serving.router.relay.ocr_relay import OCR, DocumentRelay
from serving.router.relay.replica_relay import Relay
from serving.router.request.foreign_fields import build_header
from serving.router.request.parsing import RoutedRequest, parse_request
from serving.router.request.remote_images import RemoteImages
from serving.router.scheduling.dispatcher import Dispatcher
from serving.router.scheduling.slot import Slot
from serving.router.scheduling.work_estimate import WorkEstimate, read_images
from serving.settings.stack import Settings

if TYPE_CHECKING:
    from serving.telemetry.traces import Traces

logger = logging.getLogger(__name__)

_CHAT = "/v1/chat/completions"
_TIMEOUT_HEADER = b"x-request-timeout-ms"
_NEGOTIATED = frozenset({b"content-type", b"accept-encoding"})
_GRACE_S = 0.05
"""A request ends so much later than its deadline in the queue, whose refusal says more."""

_UNTRACED: contextlib.AbstractContextManager[Mapping[str, str]] = contextlib.nullcontext({})


@dataclass(frozen=True, slots=True)
class RequestAllowance:
    """What an admitted request may use."""

    body: HeldBody
    """Memory for its body."""
    began_s: float
    timeout_s: float

    @property
    def deadline_s(self) -> float:
        """Until which it may be queued."""
        return self.began_s + self.timeout_s


@dataclass(slots=True)
class Generation:
    """Serves the routes that generate. Everything that decides is given to it."""

    settings: Settings
    access: AccessControl
    dispatcher: Dispatcher
    relay: Relay
    remote: RemoteImages
    accounts: Accounts
    documents: DocumentRelay
    traces: Traces | None = None
    """None if nothing is traced."""

    async def serve(self, incoming: Incoming) -> None:
        """Serve one request to its end.

        Raises:
            ServingError: it was refused or failed, and the reply has not begun.
            ClientGoneError: the client has left.
        """
        account = RequestAccount(self.accounts, await self._identify(incoming))
        try:
            async with self._hold(account, incoming) as allowance:
                request = await self._parse(account, incoming, allowance.body)
                request, work = self._reserve(account, request, incoming.reply)
                async with self._place(account, request, work, incoming, allowance) as slot:
                    await self._send(account, request, slot, incoming.reply)
        except DocumentsFoundError as found:
            await self._read_document(found.request, account.context, incoming)

    async def _read_document(self, request: RoutedRequest, context: RequestContext, incoming: Incoming) -> None:
        """Serve a chat about a document. It counts as a document: its pages come back as requests of their own, which
        would wait for it if it counted as one."""
        self.documents.check_enabled()
        reading, ignored = build_reading(request)
        if request.ignored or ignored:
            incoming.reply.headers.append(build_header([*request.ignored, *ignored]))
        body = orjson.dumps(reading)
        async with self.access.admitted(incoming, context.identity, COUNTED_DOCUMENT):
            with self.access.bodies.open() as memory:
                memory.take(len(body))
                scope, receive = replay_body(incoming.scope, body, incoming.receive)
                headers = [(name, value) for name, value in scope["headers"] if name not in _NEGOTIATED]
                headers += [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]
                scope = {**scope, "path": OCR, "query_string": b"", "headers": headers}
                reply = DocumentReply(incoming.reply, request, incoming.request_id)
                await self.documents.relay(incoming.request_id, scope, receive, reply, context.identity)

    async def _identify(self, incoming: Incoming) -> RequestContext:
        identity = await self.access.identify(incoming)
        credit = self.access.read_credit(incoming)
        request_id = _make_id(incoming, is_service=credit is not None)
        arrived_ns = time.time_ns()
        trace = None
        if self.traces is not None:
            trace = self.traces.begin(incoming.path, incoming.headers, arrived_ns)
        return RequestContext(request_id, incoming.path, identity, arrived_ns, credit or 0, trace)

    @contextlib.asynccontextmanager
    async def _hold(self, account: RequestAccount, incoming: Incoming) -> AsyncIterator[RequestAllowance]:
        """Let a request in, and settle it in the end. A failure after the reply has begun is reported in the stream."""
        identity, reply = account.context.identity, incoming.reply
        ending = Ending(Outcome.FAILED, 500, "internal_error")
        try:
            began_s = time.monotonic()
            timeout_s = _read_timeout(incoming.headers, self.settings.router.admission.request_timeout_s)
            try:
                self.accounts.check_room(identity)
            except ServingError:
                await discard_body(incoming.receive, self.settings.router.limits)
                raise
            async with self.access.admitted(incoming, identity, GENERATION):
                with self.access.bodies.open() as body:
                    yield RequestAllowance(body, began_s, timeout_s)
            ending = Ending.of_whole(reply.status, reply.first_byte_ns)
        except ServingError as error:
            outcome = Outcome.FAILED if account.num_tries and error.http_status >= 500 else Outcome.REFUSED
            ending = Ending(outcome, reply.status or error.http_status, error.code or "", reply.first_byte_ns)
            if not reply.has_begun:
                raise
            await reply.end_with_error(error)
        except TimeoutError:
            late = ReplicaTimeoutError("The answer was not complete within the request's time.", code="request_timeout")
            ending = Ending(Outcome.TIMED_OUT, reply.status or late.http_status, late.code or "", reply.first_byte_ns)
            if not reply.has_begun:
                raise late from None
            await reply.end_with_error(late)
        except DocumentsFoundError:
            account.hand_over()
            raise
        except (ClientGoneError, asyncio.CancelledError):
            ending = Ending(Outcome.ABORTED, reply.status or CLIENT_CLOSED, "", reply.first_byte_ns)
            raise
        finally:
            account.finish(ending)

    async def _parse(self, account: RequestAccount, incoming: Incoming, memory: HeldBody) -> RoutedRequest:
        context, settings = account.context, self.settings
        body = await read_body(incoming.scope, incoming.receive, settings.router.limits, memory)
        path = context.route
        if incoming.dialect is not None:
            path, body = _CHAT, orjson.dumps(incoming.dialect.to_chat(decode_json(body, settings.router.limits)))
        is_told = incoming.is_deepinfra or incoming.dialect is not None
        stream_usage = "finish_chunk" if is_told else settings.router.stream_usage
        request = parse_request(path, body, settings, self.dispatcher.image_config, stream_usage)
        check_model_allowed(context.identity, request.model, *settings.models[request.model].aliases)
        if request.documents:
            raise DocumentsFoundError(request)
        if request.ignored:
            incoming.reply.headers.append(build_header(request.ignored))
        account.set_price(request)
        if None in request.image_sizes:
            request = await self.remote.inline(request, settings.router)
            memory.take(len(request.body) - len(body))
        return request

    def _reserve(
        self, account: RequestAccount, request: RoutedRequest, reply: Reply
    ) -> tuple[RoutedRequest, WorkEstimate]:
        """Reserve budget and tokens. A tenant with a budget whose model has no replica yet reserves when there is one:
        until then the longest answer is unknown."""
        identity = account.context.identity
        replica = self.dispatcher.sample(request.model)
        reading = read_images(request, replica)
        max_model_len = replica.max_model_len if replica is not None else 0
        if replica is not None or not self.accounts.has_budget(identity):
            request = account.reserve(request, bound_tokens(request, reading, max_model_len))
        work = self.dispatcher.estimate(request, reading, max_model_len)
        try:
            account.reserve_tokens(work.total)
        finally:
            reply.headers += self.access.limits.headers(identity, time.monotonic())
            reply.headers += self.accounts.headers(identity)
        return request, work

    @contextlib.asynccontextmanager
    async def _place(
        self,
        account: RequestAccount,
        request: RoutedRequest,
        work: WorkEstimate,
        incoming: Incoming,
        allowance: RequestAllowance,
    ) -> AsyncIterator[Slot]:
        """Hold a place on a replica for as long as the request has time and its client is there."""
        async with asyncio.timeout(allowance.timeout_s + _GRACE_S), ClientPresence(incoming.receive):
            identity = account.context.identity
            slot = await self.dispatcher.enter(request, work, identity, deadline_s=allowance.deadline_s)
            try:
                account.queued(slot.waited_s)
                yield slot
            finally:
                slot.close(account.tokens, is_whole=incoming.reply.is_complete)

    async def _send(self, account: RequestAccount, request: RoutedRequest, slot: Slot, reply: Reply) -> None:
        """Try replicas until one has begun to answer."""
        if not account.has_reservation:
            request = account.reserve(request, bound_tokens(request, slot.reading, slot.replica.max_model_len))
        while True:
            try:
                return await self._try(account, request, slot, reply)
            except ServingError as error:
                replica_id = slot.replica.replica_id
                has_another = slot.fail(error) and error.is_retryable
                if reply.has_begun or not (has_another or await slot.wait_for_replacement(error)):
                    raise
                logger.warning("replica %s failed %s: %s", replica_id, account.context.request_id, error)

    async def _try(self, account: RequestAccount, request: RoutedRequest, slot: Slot, reply: Reply) -> None:
        """Send the request to the slot's replica, and its answer to the client."""
        account.sent_to(slot.replica, slot.reading.modes)
        context = account.context
        trace = context.trace.trying(slot.replica.replica_id) if context.trace is not None else _UNTRACED
        with trace as headers:
            try:
                last = await self.relay.relay(request, context.request_id, slot.replica, account.notes, reply, headers)
            except (ReplicaConnectError, EngineError, NoReplicaError):
                account.refused()
                raise
            account.complete(reply.status or 200, reply.first_byte_ns or time.time_ns())
            await (reply.end(last) if request.is_stream else reply.send_body(200, last))
        slot.succeed()


def _make_id(incoming: Incoming, *, is_service: bool) -> str:
    """The id that engines and the ledger know a request by: unique, whatever its client calls it. Only services of this
    stack have ids that begin with their mark."""
    if b"x-request-id" not in incoming.headers:
        return incoming.request_id
    return f"{SERVICE_MARK if is_service else ''}{incoming.request_id}.{secrets.token_hex(4)}"


def _read_timeout(headers: Mapping[bytes, bytes], longest_s: float) -> float:
    """Seconds that a request may take: what it asks for, at most what the settings allow.

    Raises:
        InvalidRequestError: the header is not a whole number of milliseconds.
    """
    given = headers.get(_TIMEOUT_HEADER)
    if given is None:
        return longest_s
    if not given.isdigit() or len(given) > 12 or int(given) == 0:
        raise InvalidRequestError(
            "x-request-timeout-ms must be a whole number of milliseconds.", code="invalid_timeout"
        )
    return min(int(given) / 1000, longest_s)
