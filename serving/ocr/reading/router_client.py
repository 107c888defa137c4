"""The service's client of the routers: which routers there are, whose key a request carries, models and quotes."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import aiohttp
import orjson

from serving.billing.credits import CREDIT_HEADER, SignCredit
from serving.errors import AuthenticationError, NoReplicaError, ServingError, from_engine
from serving.ocr_api.signed_tenant import SignedTenant

_KNOWN_S = 10.0
"""How long an answer about a key is cached. The router checks the key of every page again in any case."""
_MAX_KNOWN = 10_000
_TIMEOUT = aiohttp.ClientTimeout(total=10, sock_connect=5)
_MAX_ANSWER_BYTES = 64 * 1024
_NO_SUCH_ROUTE = (404, 405)
_NO_ENTRY = (401, 403)
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Routers:
    """The routers' addresses: one from the settings, or all that the directory lists."""

    def __init__(self, *urls: str) -> None:
        self._urls: Sequence[str] = urls
        self._turns = itertools.count()

    def update(self, urls: Sequence[str]) -> None:
        """Replace the addresses. An empty list is ignored: a directory that restarts knows no routers for a moment."""
        self._urls = urls or self._urls

    def choose(self) -> str:
        """The next address in turn. While none is known, one that refuses connections, so that requests are retried."""
        return self._urls[next(self._turns) % len(self._urls)] if self._urls else "http://127.0.0.1:9"


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant behind a request."""

    owner: str
    """Owns the jobs: the tenant's id, or the key's fingerprint when the router does not know tenants."""
    api_key: str | None
    is_one_of_many: bool = False
    """Whether the router tells tenants apart, so that this one must leave a share to others."""


@dataclass(frozen=True, slots=True)
class _KeysOwner:
    """The owner of a key, as reported by a router."""

    owner: str
    is_one_of_many: bool
    asked_s: float


class Callers:
    """Identifies callers, so that documents are accepted from known tenants only. Use it as an async context."""

    def __init__(self, routers: Routers, sign_credit: SignCredit | None = None) -> None:
        """Nothing is connected yet.

        Args:
            routers: where to ask.
            sign_credit: proves to routers that a quote is part of a document's, which they have counted already.
                Without it each page's quote counts as a request of the tenant.
        """
        self._routers = routers
        self._known: OrderedDict[str, _KeysOwner] = OrderedDict()
        self._sign_credit = sign_credit
        self._needs_key, self._asked_s = False, -math.inf
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Callers:
        # Without a limit on connections: one tenant's quotes must not delay the identification of others.
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def identify(self, authorization: str | None, signed: SignedTenant | None = None) -> Caller:
        """The tenant that a router of this stack has signed, or else the one that a router reports for the key.

        Raises:
            ServingError: the router refuses the key, or no router answers.
        """
        api_key = _read_key(authorization)
        if signed is not None:
            return Caller(signed.tenant_id, api_key, bool(signed.key_id))
        print_ = _fingerprint(api_key)
        known = self._known.get(print_)
        if known is None or time.monotonic() - known.asked_s >= _KNOWN_S:
            known = self._known[print_] = await self._ask(api_key, print_)
            self._known.move_to_end(print_)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return Caller(known.owner, api_key, known.is_one_of_many)

    async def needs_key(self) -> bool:
        """Whether the router requires API keys.

        Raises:
            NoReplicaError: no router answers.
        """
        if time.monotonic() - self._asked_s >= _KNOWN_S:
            status, _ = await self._fetch("/v1/models", None)
            self._needs_key, self._asked_s = status in _NO_ENTRY, time.monotonic()
        return self._needs_key

    async def fetch_models(self, authorization: str | None) -> bytes:
        """The router's list of models, as JSON.

        Raises:
            ServingError: the router refuses the key, or no router answers.
        """
        status, body = await self._fetch("/v1/models", _read_key(authorization))
        if status != 200:
            raise _refusal(status, _decode(body))
        return body

    async def fetch_quote(self, api_key: str | None, body: bytes) -> dict[str, object]:
        """The router's quote for a chat request.

        Raises:
            ServingError: the router refuses the request, or no router answers.
        """
        signed: dict[str, str] = {}
        if self._sign_credit is not None:
            request_id = f"quote-{uuid.uuid4().hex}"
            signed = {"x-request-id": request_id, CREDIT_HEADER: self._sign_credit(request_id, 0)}
        status, answer = await self._fetch("/v1/quote", api_key, body, signed)
        found = _decode(answer)
        if status != 200:
            raise _refusal(status, found)
        return found

    async def _ask(self, api_key: str | None, print_: str) -> _KeysOwner:
        status, body = await self._fetch("/v1/tenant", api_key)
        if status in _NO_SUCH_ROUTE:
            # Another OpenAI-compatible server, which checks the key with every page.
            return _KeysOwner(f"key-{print_}", False, time.monotonic())
        found = _decode(body)
        if status != 200:
            raise _refusal(status, found)
        # A router without keys reports one tenant for everybody, and no key.
        return _KeysOwner(str(found.get("id") or f"key-{print_}"), bool(found.get("key_id")), time.monotonic())

    async def _fetch(
        self, path: str, api_key: str | None, body: bytes | None = None, more: Mapping[str, str] = _NO_HEADERS
    ) -> tuple[int, bytes]:
        """Status and body of a router's answer; with a body the request is a POST.

        Raises:
            NoReplicaError: no router answers.
        """
        assert self._session is not None
        headers = {**more, **({"authorization": f"Bearer {api_key}"} if api_key is not None else {})}
        method = "GET"
        if body is not None:
            method, headers["content-type"] = "POST", "application/json"
        for _ in range(2):
            url = f"{self._routers.choose()}{path}"
            try:
                content = io.BytesIO(body) if body is not None else None  # not in one write: it contains a page
                async with self._session.request(
                    method, url, data=content, headers=headers, allow_redirects=False
                ) as answer:
                    return answer.status, await answer.content.read(_MAX_ANSWER_BYTES)
            except (aiohttp.ClientError, OSError):
                continue
        raise NoReplicaError("The router cannot be reached; try again shortly.", code="router_unreachable")


def _read_key(authorization: str | None) -> str | None:
    if authorization is None:
        return None
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip() or not key.isascii() or not key.strip().isprintable():
        raise AuthenticationError("Provide the API key in an Authorization header: Bearer YOUR_KEY.")
    return key.strip()


def _fingerprint(api_key: str | None) -> str:
    return hashlib.sha256((api_key or "").encode()).hexdigest()[:32]


def _decode(body: bytes) -> dict[str, object]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(status: int, answer: dict[str, object]) -> ServingError:
    if status == 401:
        error = answer.get("error")
        told = error if isinstance(error, dict) else {}
        return AuthenticationError(str(told.get("message") or "Incorrect API key provided."), code=told.get("code"))
    return from_engine(status, answer)
