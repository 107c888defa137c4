"""The way of a request that generates: who asks, may they, what is it, when is its turn, the answer, the record."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from starlette.types import Receive

from serving.billing.credits import SERVICE_MARK
from serving.billing.records import Outcome
from serving.cluster.directory import ReplicaRecord
from serving.errors import InvalidRequestError, ReplicaTimeoutError, ServingError
from serving.http.bodies import ClientGoneError, HeldBody, discard_body, read_body
from serving.http.disconnects import ClientPresence
from serving.http.reply import Reply
from serving.router.access.auth import check_model_allowed
from serving.router.access.control import AccessControl, Incoming
from serving.router.access.limits import GENERATION
from serving.router.accounting.accounts import Accounts
from serving.router.accounting.metering import CLIENT_CLOSED, Accountant, Ending, RequestContext
from serving.router.accounting.token_bounds import bound_tokens
from serving.router.relay.backend import Gateway
from serving.router.request.parsing import RoutedRequest, parse_request
from serving.router.request.remote_images import RemoteImages
from serving.router.scheduling.dispatcher import Dispatcher
from serving.router.scheduling.work_estimate import read_images
from serving.settings.stack import Settings

if TYPE_CHECKING:
    from serving.telemetry.traces import Traces

_TIMEOUT_HEADER = b"x-request-timeout-ms"
_GRACE_S = 0.05


@dataclass(slots=True)
class Generation:
    """Serves the routes that generate. Everything it needs is given to it; it decides nothing itself."""

    settings: Settings
    access: AccessControl
    dispatcher: Dispatcher
    backend: Gateway
    accountant: Accountant
    remote: RemoteImages
    accounts: Accounts
    traces: Traces | None = None
    """None when nothing is traced."""

    async def serve(self, incoming: Incoming) -> None:
        """One request, to its end and its record.

        Raises:
            ServingError: it was refused or failed, and the reply has not begun.
            ClientGoneError: nobody is there to be answered.
        """
        headers, reply = incoming.headers, incoming.reply
        identity = await self.access.identify(incoming)
        credit = self.access.read_credit(incoming)
        context = RequestContext(
            _make_id(incoming, is_service=credit is not None), incoming.path, identity, time.time_ns()
        )
        context.credit_nanodollars = credit or 0
        if self.traces is not None:
            context.trace = self.traces.begin(incoming.path, headers, context.arrived_ns)
        ending = Ending(Outcome.FAILED, 500, "internal_error")
        reply.on_whole = lambda: self.accountant.finish_whole(
            context, Ending.of_whole(reply.status, reply.first_byte_ns)
        )
        try:
            await self._serve_admitted(context, incoming)
            ending = Ending.of_whole(reply.status, reply.first_byte_ns)
        except ServingError as error:
            ending = Ending.from_error(error, context, reply.status, reply.first_byte_ns)
            if not reply.has_begun:
                raise
            await reply.end_with_error(error)
        except TimeoutError:
            late = ReplicaTimeoutError("The answer was not complete within the request's time.", code="request_timeout")
            ending = Ending(Outcome.TIMED_OUT, reply.status or late.http_status, late.code or "", reply.first_byte_ns)
            if not reply.has_begun:
                raise late from None
            await reply.end_with_error(late)
        except (ClientGoneError, asyncio.CancelledError):
            ending = Ending(Outcome.ABORTED, reply.status or CLIENT_CLOSED, "", reply.first_byte_ns)
            raise
        finally:
            self.accountant.finish(context, ending)

    async def _serve_admitted(self, context: RequestContext, incoming: Incoming) -> None:
        began_s, limits, reply = time.monotonic(), self.access.limits, incoming.reply
        timeout_s = _read_timeout(incoming.headers, self.settings.router.admission.request_timeout_s)
        try:
            self.accounts.check_room(context.identity)
        except ServingError:
            await discard_body(incoming.receive, self.settings.router.limits)
            raise
        async with self.access.admitted(incoming, context.identity, GENERATION):
            with self.access.bodies.open() as held:
                body = await read_body(incoming.scope, incoming.receive, self.settings.router.limits, held)
                request = await self._understand(context, incoming, body, held)
                sample = self.dispatcher.sample(request.model)
                if sample is not None or not self.accounts.has_budget(context.identity):
                    request = self._reserve(context, request, sample)
                context.reserved_tokens = self.dispatcher.estimate(request).total
                try:
                    limits.reserve_tokens(context.identity, context.reserved_tokens, time.monotonic())
                except ServingError:
                    context.reserved_tokens = 0
                    raise
                finally:
                    reply.headers += limits.headers(context.identity, time.monotonic())
                    reply.headers += self.accounts.headers(context.identity)
                # A little longer than the queue's own deadline, whose refusal says more.
                async with asyncio.timeout(timeout_s + _GRACE_S):
                    await self._answer(context, request, began_s + timeout_s, reply, incoming.receive)

    async def _understand(
        self, context: RequestContext, incoming: Incoming, body: bytes, held: HeldBody
    ) -> RoutedRequest:
        request = parse_request(context.route, body, self.settings)
        if incoming.is_deepinfra or self.settings.router.usage_in_last_chunk:
            request = replace(request, usage_in_last_chunk=not request.wants_stream_usage)
        check_model_allowed(context.identity, request.model, *self.settings.models[request.model].aliases)
        context.start(request, self.accounts.find_price(request.model, context.identity.tenant_id, context.arrived_ns))
        if None in request.image_sizes:
            request = await self.remote.inline(request, self.settings.router)
            held.take(len(request.body) - len(body))
            context.request = request
        return request

    def _reserve(self, context: RequestContext, request: RoutedRequest, replica: ReplicaRecord | None) -> RoutedRequest:
        """Hold back what the request can cost, and give it as it may be sent."""
        max_model_len = replica.max_model_len if replica is not None else 0
        self.accounts.reserve(context, bound_tokens(request, read_images(request, replica), max_model_len))
        return context.understood()[0]

    async def _answer(
        self, context: RequestContext, request: RoutedRequest, deadline_s: float, reply: Reply, receive: Receive
    ) -> None:
        slot = self.dispatcher.try_enter(request, context.identity, deadline_s=deadline_s)
        if slot is None:
            async with ClientPresence(receive):
                slot = await self.dispatcher.enter(request, context.identity, deadline_s=deadline_s)
        context.queue_wait_ns = round(slot.waited_s * 1e9)
        try:
            if context.reservation is None:  # while it waited for the model's first replica, nobody knew its context
                self._reserve(context, request, slot.replica)
            await self.backend.answer(context, slot, reply, receive)
        finally:
            slot.close(context.tokens, is_whole=reply.is_complete)


def _make_id(incoming: Incoming, *, is_service: bool) -> str:
    """What engines and the ledger know a request by: unique, whatever its client calls it, and a service's cannot be
    called so by anybody else."""
    if b"x-request-id" not in incoming.headers:
        return incoming.request_id
    return f"{SERVICE_MARK if is_service else ''}{incoming.request_id}.{secrets.token_hex(4)}"


def _read_timeout(headers: Mapping[bytes, bytes], longest_s: float) -> float:
    """Seconds that a request may take: what it asks for, at most what the settings allow.

    Raises:
        InvalidRequestError: the header is no whole number of milliseconds.
    """
    given = headers.get(_TIMEOUT_HEADER)
    if given is None:
        return longest_s
    if not given.isdigit() or len(given) > 12 or int(given) == 0:
        raise InvalidRequestError(
            "x-request-timeout-ms must be a whole number of milliseconds.", code="invalid_timeout"
        )
    return min(int(given) / 1000, longest_s)
