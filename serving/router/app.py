"""The router's ASGI app: routes, and the few steps from a request to a replica and back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson
from starlette.types import Receive, Scope, Send

from serving.billing.prices import Price
from serving.directory import EMPTY, ReplicaRecord, Snapshot
from serving.errors import (
    BodyTooLargeError,
    InternalError,
    MethodNotAllowedError,
    ModelNotFoundError,
    NoReplicaError,
    RouteNotFoundError,
    ServingError,
)
from serving.router.balance import choose_replica
from serving.router.relay import Relay, cancel, send_body, send_error
from serving.router.requests import RoutedRequest, parse_request, resolve_modes
from serving.router.usage import UsageNotes
from serving.settings import Settings

logger = logging.getLogger(__name__)

_GENERATE = ("/v1/chat/completions", "/v1/completions")
_LISTS = ("/v1/models", "/health", "/ready")
_MODEL = "/v1/models/"
_PREFIX = "/v1/openai/"  # DeepInfra's
_DISCARD_S = 10.0


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


@dataclass(slots=True)
class RouterApp:
    """The app. `read_snapshot` gives the replica list as it is now; whoever follows the directory fills it."""

    settings: Settings
    read_snapshot: Callable[[], Snapshot] = lambda: EMPTY
    started_s: int = field(default_factory=lambda: int(time.time()))
    _relay: Relay = field(init=False)
    _prices: dict[str, Price] = field(init=False)
    _outstanding: Counter[str] = field(default_factory=Counter)
    _turns: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        key = self.settings.engine.api_key
        self._relay = Relay(self.settings.router, key.get_secret_value() if key is not None else None)
        self._prices = {name: Price.from_settings(model.price) for name, model in self.settings.models.items()}

    async def start(self) -> None:
        await self._relay.start()

    async def close(self) -> None:
        await self._relay.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request; whatever goes wrong ends as an answer in OpenAI's shape."""
        if scope["type"] != "http":
            return
        try:
            await self._route(scope, receive, send)
        except ServingError as error:
            await send_error(send, error)
        except ClientGoneError:
            return
        except Exception:
            logger.exception("the router failed on %s %s", scope["method"], scope["path"])
            await send_error(send, InternalError("The router failed on this request; it has been logged."))

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _canonical_path(scope["path"])
        allowed = "POST" if path in _GENERATE else "GET" if path in _LISTS or path.startswith(_MODEL) else None
        if allowed is None:
            raise RouteNotFoundError(f"There is no {scope['method']} {scope['path'][:200]} here.")
        if scope["method"] != allowed and not (allowed == "GET" and scope["method"] == "HEAD"):
            raise MethodNotAllowedError(f"{path} answers {allowed} only.", allowed)
        if path in _GENERATE:
            await self._generate(path, receive, send, scope)
        elif path == "/v1/models":
            await send_body(send, 200, orjson.dumps({"object": "list", "data": self._model_cards()}))
        elif path.startswith(_MODEL):
            await send_body(send, 200, orjson.dumps(self._find_card(path.removeprefix(_MODEL))))
        elif path == "/health":
            await send_body(send, 200, b'{"status":"up"}')
        else:
            await self._answer_ready(send)

    async def _generate(self, path: str, receive: Receive, send: Send, scope: Scope) -> None:
        body = await read_body(scope, receive, self.settings.router.limits.max_body_bytes)
        request = parse_request(path, body, self.settings)
        relaying = asyncio.ensure_future(self._relay_somewhere(request, send))
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((relaying, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(leaving)
            if not relaying.done():
                await cancel(relaying)  # closes the connection to the replica, which aborts the request
        if not relaying.cancelled():
            relaying.result()

    async def _relay_somewhere(self, request: RoutedRequest, send: Send) -> None:
        """Try replicas until one has taken the request; nothing reaches the client before that."""
        tried: list[str] = []
        failure: ServingError = NoReplicaError("No replica of this model is ready; try again shortly.")
        for _ in range(self.settings.router.max_tries):
            ready = self.read_snapshot().ready(request.model)
            replica = choose_replica(ready, self._outstanding, tried, next(self._turns))
            if replica is None:
                break
            tried.append(replica.replica_id)
            self._outstanding[replica.replica_id] += 1
            try:
                return await self._relay.relay(request, replica, self._notes(request, replica), send)
            except ServingError as error:
                if not error.is_retryable:
                    raise
                logger.warning("replica %s failed a request: %s", replica.replica_id, error)
                failure = error
            finally:
                self._outstanding[replica.replica_id] -= 1
                if not self._outstanding[replica.replica_id]:
                    del self._outstanding[replica.replica_id]
        raise failure

    def _notes(self, request: RoutedRequest, replica: ReplicaRecord) -> UsageNotes:
        return UsageNotes(self._prices[request.model], resolve_modes(request, replica))

    def _model_cards(self) -> list[dict[str, object]]:
        """OpenAI's cards: every name that a request may use, with the model that runs behind it as `root`."""
        snapshot = self.read_snapshot()
        cards: list[dict[str, object]] = []
        for name, model in self.settings.models.items():
            ready = snapshot.ready(name)
            longest = min((record.max_model_len for record in ready), default=None)
            for alias in (name, *model.aliases):
                card = {"id": alias, "object": "model", "created": self.started_s, "owned_by": "serving"}
                cards.append({**card, "root": name, "max_model_len": longest, "ready_replicas": len(ready)})
        return cards

    def _find_card(self, name: str) -> dict[str, object]:
        card = next((card for card in self._model_cards() if card["id"] == name), None)
        if card is None:
            raise ModelNotFoundError(f"The model '{name[:100]}' does not exist; GET /v1/models lists those that do.")
        return card

    async def _answer_ready(self, send: Send) -> None:
        snapshot = self.read_snapshot()
        counts = {name: len(snapshot.ready(name)) for name in self.settings.models}
        is_ready = any(counts.values())
        await send_body(send, 200 if is_ready else 503, orjson.dumps({"ready": is_ready, "replicas": counts}))


def _canonical_path(path: str) -> str:
    path = path.rstrip("/")
    return "/v1/" + path.removeprefix(_PREFIX) if path.startswith(_PREFIX) else path


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: it announces or brings more than `max_bytes`.
        ClientGoneError: the client left while sending.
    """
    too_large = BodyTooLargeError(f"The body may be {max_bytes} bytes at most.")
    headers = dict(scope["headers"])
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > max_bytes:
        if b"expect" not in headers:  # who asks before sending has sent nothing yet
            await _discard_body(receive, max_bytes)
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            if message.get("more_body", False):
                await _discard_body(receive, max_bytes)
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _discard_body(receive: Receive, max_bytes: int) -> None:
    """Read on for a while before refusing: a client that is still sending would see a reset instead of the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            size = 0
            while size <= max_bytes:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
