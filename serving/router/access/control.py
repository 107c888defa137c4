"""The checks that every route makes: whose request it is, the tenant's limits, memory for its body."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from starlette.types import Receive, Scope

from serving.billing.credits import CREDIT_HEADER, CreditReader
from serving.errors import OverloadedError, ServingError
from serving.http.bodies import BodyBudget, discard_body
from serving.http.cors import CorsRules
from serving.http.origins import FORM, JSON, HostRules, build_rules, check_content_type, check_source
from serving.http.reply import Reply
from serving.router.access.auth import Authenticator
from serving.router.access.limits import Charge, TenantLimits
from serving.router.dialects.dialect import Dialect
from serving.settings.stack import Settings
from serving.settings.tenants import Identity

_CREDIT_HEADER = CREDIT_HEADER.encode()
_STOPPING_S = 5.0


@dataclass(frozen=True, slots=True)
class Incoming:
    """One HTTP request that has arrived."""

    request_id: str
    path: str
    """Canonical: without a trailing slash, and with DeepInfra's prefix replaced."""
    is_deepinfra: bool
    """Whether its path has DeepInfra's prefix."""
    headers: Mapping[bytes, bytes]
    scope: Scope
    receive: Receive
    reply: Reply
    dialect: Dialect | None = None
    """What its body and its answer are written in, if that is not a chat completion."""


@dataclass(slots=True)
class AccessControl:
    """One per router process."""

    settings: Settings
    keys: Authenticator
    limits: TenantLimits
    is_stopping: bool = False
    """Whether the whole stack is shutting down."""
    bodies: BodyBudget = field(init=False)
    """For all requests that this router holds, of every kind."""
    cors: CorsRules | None = field(init=False)
    """None if pages of other sites may not use the API."""
    _credits: CreditReader = field(init=False)
    _hosts: HostRules = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = BodyBudget(self.settings.router.limits.max_held_bytes)
        router, ocr = self.settings.router, self.settings.ocr
        self.cors = CorsRules(router.cors_origins) if router.cors_origins else None
        self._hosts = build_rules(router.host, router.allowed_hosts)
        self._credits = CreditReader(ocr.secret, ocr.secret_file)

    async def check_source(self, incoming: Incoming, *, is_page: bool = False, takes_forms: bool = False) -> None:
        """If requests need no key, refuse what another site's web page may have sent.

        Raises:
            PermissionDeniedError: it comes from another site, or is addressed to a name that is not this router's.
            InvalidRequestError: its body has a type that browsers send for any site.
        """
        if not self.keys.is_open:
            return
        try:
            is_trusted = self.cors is not None and self.cors.allows(incoming.headers)
            check_source(incoming.headers, self._hosts, is_page=is_page, is_trusted=is_trusted)
            check_content_type(incoming.headers, JSON, *((FORM,) if takes_forms else ()))
        except ServingError:
            await discard_body(incoming.receive, self.settings.router.limits)
            raise

    async def check_open(self, incoming: Incoming) -> None:
        """Refuse new work while the whole stack shuts down, except pages of documents that are being read.

        Raises:
            OverloadedError: the stack is shutting down, and this would begin something.
        """
        if not self.is_stopping or incoming.scope["method"] != "POST" or self.read_credit(incoming) is not None:
            return
        await discard_body(incoming.receive, self.settings.router.limits)
        raise OverloadedError("This service is shutting down; try again shortly.", _STOPPING_S, code="shutting_down")

    async def identify(self, incoming: Incoming) -> Identity:
        """Identify the tenant. Of an unauthenticated request only as much of the body is read as an orderly refusal
        needs.

        Raises:
            AuthenticationError: the key is missing or unknown.
        """
        try:
            return self.keys.identify(incoming.headers)
        except ServingError:
            await discard_body(incoming.receive, self.settings.router.limits)
            raise

    @contextlib.asynccontextmanager
    async def admitted(self, incoming: Incoming, identity: Identity, charge: Charge) -> AsyncIterator[None]:
        """Count a request for as long as it is served.

        Raises:
            RateLimitError: the tenant has too many requests at once or in this minute.
        """
        now_s = time.monotonic()
        try:
            self.limits.admit(identity, now_s, charge)
        except ServingError:
            incoming.reply.headers += self.limits.headers(identity, now_s)
            await discard_body(incoming.receive, self.settings.router.limits)
            raise
        try:
            yield
        finally:
            self.limits.leave(identity, charge)

    def read_credit(self, incoming: Incoming) -> int | None:
        """What the request was charged before, in nanodollars, as an OCR service of this stack has signed; None if the
        request is not from such a service."""
        value = incoming.headers.get(_CREDIT_HEADER)
        return self._credits.read(incoming.request_id, value.decode("latin-1")) if value is not None else None
