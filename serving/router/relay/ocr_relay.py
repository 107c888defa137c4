"""Relays documents and the playground to an OCR service: bytes in both directions, without looking into them.

The services come from the directory. A service that cannot be connected to has received nothing, so another one is
tried as long as none of the body has been read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import NoReturn

import aiohttp
from starlette.types import Receive, Scope

from serving.billing.credits import CREDIT_HEADER
from serving.cluster.directory import ServiceRecord
from serving.errors import (
    BodyTooLargeError,
    InternalError,
    NoReplicaError,
    ReplicaUnreachableError,
    RequestTimeoutError,
    RouteNotFoundError,
    ServingError,
)
from serving.http.bodies import ClientGoneError, too_slow
from serving.http.body_pace import BodyPace, receive_in_time
from serving.http.disconnects import ClientPresence
from serving.http.reply import Reply
from serving.ocr_api.signed_tenant import TENANT_HEADER, VALID_S, SignedRequest, SignedTenant, TenantSigner
from serving.router.access.limits import DOCUMENT, LOOKUP, POLL, Charge
from serving.settings.ocr import OcrSettings
from serving.settings.router import LimitSettings, RouterSettings
from serving.settings.tenants import Identity

OCR = "/v1/ocr"
QUOTE = OCR + "/quote"
PLAYGROUND = "/playground/"
_TAKE_DOCUMENTS = (OCR, QUOTE, OCR + "/jobs")
_CONNECT_S = 5.0
_FORM_BYTES = 128 * 1024
"""What the encoding as a form or JSON may add to a document."""
_DROPPED = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "expect", "x-request-id"}
) | {"proxy-authorization", "proxy-authenticate", "proxy-connection", CREDIT_HEADER, TENANT_HEADER, "origin"}
"""Hop-by-hop headers (RFC 9110, section 7.6.1), those that are set anew, and those about the router's own address."""
_FETCH = "sec-fetch-"
_ANSWER_DROPPED = frozenset({"connection", "keep-alive", "transfer-encoding", "x-request-id", "date", "server"})
_METHODS_WITH_BODY = ("POST", "PUT", "PATCH")


def find_charge(method: str, path: str) -> Charge | None:
    """What a request for the OCR service counts as; None for its web pages, which are free."""
    if path == "" or path.startswith(PLAYGROUND):
        return None
    if method in ("GET", "HEAD"):
        return POLL
    return DOCUMENT if method == "POST" and path in _TAKE_DOCUMENTS else LOOKUP


def is_for_ocr(path: str) -> bool:
    """Whether the OCR service answers a path, given without a trailing slash."""
    return path == OCR or path.startswith((OCR + "/", PLAYGROUND)) or path == ""


class DocumentRelay:
    """Owns the connections to the OCR services. One per router process."""

    def __init__(self, router: RouterSettings, ocr: OcrSettings) -> None:
        self._router = router
        self._ocr = ocr
        self._services: Sequence[ServiceRecord] = ()
        self._turns = itertools.count()
        self._signer = TenantSigner(ocr.secret, ocr.secret_file)
        self._session: aiohttp.ClientSession | None = None
        self.num_open = 0
        """Requests being relayed."""

    @property
    def services(self) -> Sequence[ServiceRecord]:
        return self._services

    async def start(self) -> None:
        """Must run inside the event loop that relays."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=self._router.read_timeout_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def update(self, services: Sequence[ServiceRecord]) -> None:
        """These are the services from now on."""
        self._services = services

    def check_enabled(self) -> None:
        """Raise RouteNotFoundError if the settings have no OCR service."""
        if not self._ocr.enabled:
            raise RouteNotFoundError("This stack has no OCR service; set ocr.enabled to start one.")

    async def relay_quote(
        self, request_id: str, scope: Scope, receive: Receive, reply: Reply, identity: Identity
    ) -> None:
        """Relay the question what a document would cost.

        Raises:
            ServingError: as `relay`, or the settings have no OCR service.
            ClientGoneError: the client has left.
        """
        self.check_enabled()
        await self.relay(request_id, {**scope, "path": QUOTE}, receive, reply, identity)

    async def relay(
        self, request_id: str, scope: Scope, receive: Receive, reply: Reply, identity: Identity | None = None
    ) -> None:
        """Relay a request to a service and its answer to the client. If the client leaves, the service's request ends
        too.

        Args:
            request_id: the router's, which the service goes by as well.
            scope: with the canonical path.
            receive: the request's body.
            reply: for the answer.
            identity: whose request it is, told to the service with a signature; None for pages that are everybody's.

        Raises:
            ServingError: no service can be reached, or the body is too large or too slow.
            ClientGoneError: the client has left.
        """
        self.num_open += 1
        try:
            await self._relay(request_id, scope, receive, reply, identity)
        finally:
            self.num_open -= 1

    async def _relay(
        self, request_id: str, scope: Scope, receive: Receive, reply: Reply, identity: Identity | None
    ) -> None:
        if self._session is None:
            raise InternalError("The router has not started.")
        headers = self._build_headers(request_id, scope, identity)
        body = RelayedBody(receive, self._router.limits, self._find_limit())
        has_body = scope["method"] in _METHODS_WITH_BODY
        path = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
        for service in self._in_turn():
            try:
                asked = self._session.request(
                    scope["method"],
                    service.url + path,
                    headers=headers,
                    data=body.read() if has_body else None,
                    allow_redirects=False,
                )
                async with asked as answer:
                    await self._pass_on(answer, receive, reply, body)
                return
            except aiohttp.ClientConnectorError:
                continue
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if body.failure is not None:
                    raise body.failure from None
                await _break_off(reply, ReplicaUnreachableError("The OCR service was lost while it answered."), error)
        raise NoReplicaError("No OCR service is ready; try again shortly.", code="no_ocr_service")

    def _build_headers(self, request_id: str, scope: Scope, identity: Identity | None) -> list[tuple[str, str]]:
        """Return the client's headers that the service may see, the request id, and the signed tenant."""
        given = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = [(name, value) for name, value in given if name not in _DROPPED and not name.startswith(_FETCH)]
        headers.append(("x-request-id", request_id))
        if identity is not None:
            authorization = next((value for name, value in given if name == "authorization"), "")
            request = SignedRequest(scope["method"], scope["path"], request_id, authorization)
            tenant = SignedTenant(identity.tenant_id, identity.key_id or "", int(time.time()) + VALID_S)
            signed = self._signer.sign(tenant, request)
            headers += [(TENANT_HEADER, signed)] if signed is not None else []
        return headers

    async def _pass_on(self, answer: aiohttp.ClientResponse, receive: Receive, reply: Reply, body: RelayedBody) -> None:
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in answer.headers.items()
            if name.lower() not in _ANSWER_DROPPED
        ]
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        if not body.is_whole:  # answered before the body was read: a short refusal
            content = await answer.read()
            await reply.pass_on(start)
            await reply.pass_on({"type": "http.response.body", "body": content, "more_body": False})
            return
        async with ClientPresence(receive):
            await reply.pass_on(start)
            async for piece in answer.content.iter_any():
                await reply.pass_on({"type": "http.response.body", "body": piece, "more_body": True})
            await reply.pass_on({"type": "http.response.body", "body": b"", "more_body": False})

    def _in_turn(self) -> list[ServiceRecord]:
        """All services, starting with a different one each time."""
        if not self._services:
            return []
        first = next(self._turns) % len(self._services)
        return [*self._services[first:], *self._services[:first]]

    def _find_limit(self) -> int:
        return max(self._router.limits.max_body_bytes, self._ocr.max_document_bytes) + _FORM_BYTES


async def _break_off(reply: Reply, failure: ServingError, cause: Exception) -> NoReturn:
    """Report a lost service as far as possible: in a stream by an event, in a body that was partly sent by closing its
    connection."""
    if not reply.has_begun:
        raise failure from cause
    if reply.is_stream:
        await reply.end_with_error(failure)
    raise ClientGoneError from cause


class RelayedBody:
    """A request's body while it is relayed. What is wrong with it is kept, since aiohttp wraps what its body raises."""

    def __init__(self, receive: Receive, limits: LimitSettings, max_bytes: int) -> None:
        self._receive = receive
        self._limits = limits
        self._pace = BodyPace.from_limits(limits)
        self._num_left = max_bytes
        self.is_whole = True
        self.failure: BodyTooLargeError | RequestTimeoutError | ClientGoneError | None = None

    async def read(self) -> AsyncIterator[bytes]:
        self.is_whole = False
        while True:
            try:
                message = await receive_in_time(self._receive, self._pace)
            except TimeoutError:
                raise self._fail(too_slow(self._limits)) from None
            if message["type"] == "http.disconnect":
                raise self._fail(ClientGoneError())
            part = message.get("body", b"")
            self._num_left -= len(part)
            if self._num_left < 0:
                raise self._fail(BodyTooLargeError("The body is larger than a document may be."))
            self.is_whole = not message.get("more_body", False)
            if part:
                yield part
            if self.is_whole:
                return

    def _fail(self, failure: BodyTooLargeError | RequestTimeoutError | ClientGoneError) -> Exception:
        self.failure = failure
        return failure
