"""Limits on request bodies: size, duration, memory after parsing, and nesting depth."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import orjson
from starlette.types import Message, Receive, Scope

from serving.errors import BodyTooLargeError, InvalidRequestError, OverloadedError, RequestTimeoutError, ServingError
from serving.http.body_pace import BodyPace, receive_in_time
from serving.http.content_codings import decode_body
from serving.settings.router import LimitSettings

_DISCARD_S = 10.0
_FEW = 512
_BODY_HEADERS = frozenset({b"content-length", b"expect", b"content-encoding"})
_ABOUT_BODY = frozenset({b"content-length", b"content-encoding", b"transfer-encoding"})
"""Headers that no longer fit a body which was decoded."""
_QUICK_BYTES = 64 * 1024
"""Bodies up to this size are decoded without a thread."""
_BOM = b"\xef\xbb\xbf"
"""Of UTF-8; some clients begin a body with it."""
_SINGLE_HEADERS = frozenset(
    {
        b"api-key",
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"host",
        b"idempotency-key",
        b"origin",
        b"sec-fetch-mode",
        b"sec-fetch-site",
        b"traceparent",
        b"x-api-key",
        b"x-request-id",
        b"x-request-timeout-ms",
        b"x-serving-credit",
        b"x-serving-tenant",
    }
)
"""Headers that the stack acts on, which a request may contain only once. Duplicates of the headers that frame the
message (Content-Length, Transfer-Encoding) are refused by the protocol."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


class BodyBudget:
    """Counts the bytes of all bodies that one process holds, from their first byte until their requests end."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_held_bytes = 0

    def open(self) -> HeldBody:
        """Open an account for one request's body: `with budget.open() as held`."""
        return HeldBody(self)

    def _take(self, num_bytes: int) -> None:
        if self.num_held_bytes + num_bytes > self._max_bytes:
            raise OverloadedError("The service holds as many requests as it can; try again shortly.")
        self.num_held_bytes += num_bytes


class HeldBody:
    """One request's share of the budget, returned when its context ends."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._budget.num_held_bytes -= self._num_bytes
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count more bytes as held. Only received bytes count: an attacker could announce a lot and send nothing.

        Raises:
            OverloadedError: the process already holds too many bytes.
        """
        self._budget._take(num_bytes)
        self._num_bytes += num_bytes


class Held(Protocol):
    """Counts the bytes of a body while it is read, and refuses those that do not fit."""

    def take(self, num_bytes: int, /) -> None: ...


async def read_body(scope: Scope, receive: Receive, limits: LimitSettings, held: Held | None = None) -> bytes:
    """Read the whole body, decoded if it was compressed, and without a byte order mark.

    Args:
        scope: the request's ASGI scope.
        receive: the request's ASGI channel.
        limits: largest size and slowest rate.
        held: where the bytes are counted.

    Raises:
        BodyTooLargeError: the body is larger than allowed, as it is or decoded, or announced to be.
        UnsupportedCodingError: it is compressed in a way that is not supported.
        InvalidRequestError: it is not compressed in the way that it says.
        RequestTimeoutError: the body arrived too slowly.
        ServingError: `held` refused the body.
        ClientGoneError: the client disconnected while sending.
    """
    announced = b"0"
    coding = b""
    awaits_leave = False
    for name, value in scope["headers"]:
        if name in _BODY_HEADERS:
            if name == b"content-length":
                announced = value
            elif name == b"expect":
                awaits_leave = True
            else:
                coding = value
    if announced.isdigit() and (len(announced) > 18 or int(announced) > limits.max_body_bytes):
        if not awaits_leave:  # a client that waits for `100 Continue` has sent nothing yet
            await discard_body(receive, limits)
        raise _too_large(limits)
    try:
        body = await _collect(receive, limits, held)
    except TimeoutError as error:
        raise too_slow(limits) from error
    if coding:
        decode = functools.partial(decode_body, body, coding, limits.max_body_bytes)
        body = decode() if len(body) <= _QUICK_BYTES else await asyncio.to_thread(decode)
        if held is not None:
            held.take(len(body))
    return body[len(_BOM) :] if body.startswith(_BOM) else body


async def _collect(receive: Receive, limits: LimitSettings, held: Held | None) -> bytes:
    parts: list[bytes] = []
    size = 0
    pace = BodyPace.from_limits(limits)
    while True:
        message = await receive_in_time(receive, pace)
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        has_more = message.get("more_body", False)
        size += len(part)
        if size > limits.max_body_bytes:
            parts.clear()
            if has_more:
                await discard_body(receive, limits)
            raise _too_large(limits)
        if held is not None:
            try:
                held.take(len(part))
            except ServingError:
                parts.clear()
                if has_more:
                    await discard_body(receive, limits)
                raise
        parts.append(part)
        if not has_more:
            return parts[0] if len(parts) == 1 else b"".join(parts)


def too_slow(limits: LimitSettings) -> RequestTimeoutError:
    """Return the error for a body that arrives too slowly."""
    return RequestTimeoutError(
        f"The body stopped for {limits.body_timeout_s:g} seconds, or came more slowly than "
        f"{limits.min_body_bytes_per_s} bytes a second for as long; send it faster, or less of it."
    )


def _too_large(limits: LimitSettings) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body may be {limits.max_body_bytes} bytes at most.")


async def discard_body(receive: Receive, limits: LimitSettings) -> None:
    """Read on for a while before refusing; otherwise a client that is still sending sees a reset, not the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(_DISCARD_S, limits.body_timeout_s)):
            size = 0
            while size <= limits.max_body_bytes:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def replay_body(scope: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """The request with a body that has been read, and perhaps changed, in the place of its own; then what follows."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _ABOUT_BODY]
    headers.append((b"content-length", b"%d" % len(body)))
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return {**scope, "headers": headers}, receive_again


def decode_json(body: bytes, limits: LimitSettings) -> dict[str, Any]:
    """Parse the body as a JSON object within limits of memory and depth.

    Extensions of JSON that Python's own parser accepts (NaN, lone surrogates, huge numbers) are refused, so that the
    engine never understands a body that the router did not.

    Raises:
        InvalidRequestError: the body is not a JSON object, or exceeds a limit.
    """
    check_size_in_memory(body, limits)
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(payload, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    check_json(payload, limits)
    return payload


def check_size_in_memory(body: bytes, limits: LimitSettings) -> None:
    """Refuse a body that would fill memory, before parsing it.

    Every value except the first follows one of `,` `[` `{`, so counting these bounds the number of values at the speed
    of a search. Those inside strings are counted as well; the limit is far above what real texts contain.

    Raises:
        InvalidRequestError: there may be more values than allowed.
    """
    most = limits.max_json_values
    if len(body) > most and sum(_count(body, sign) for sign in (b",", b"[", b"{")) > most:
        raise _too_many_values(limits)


def _count(body: bytes, sign: bytes) -> int:
    """Count like `body.count`, but up to ten times as fast where matches are rare, as in a base64 image."""
    at = -1
    for number in range(_FEW):
        at = body.find(sign, at + 1)
        if at < 0:
            return number
    return _FEW + body.count(sign, at + 1)


def check_json(payload: Any, limits: LimitSettings) -> None:
    """Check a decoded value against the limits of depth and number of values.

    Raises:
        InvalidRequestError: the value exceeds a limit.
    """
    level: list[Any] = [payload]
    num_values = 1
    depth = 0
    while level:
        if depth > limits.max_json_depth:
            raise InvalidRequestError(
                f"The body may be nested {limits.max_json_depth} levels deep at most.", code="json_too_deep"
            )
        depth += 1
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        num_values += len(below)
        if num_values > limits.max_json_values:
            raise _too_many_values(limits)
        level = below


def _too_many_values(limits: LimitSettings) -> InvalidRequestError:
    return InvalidRequestError(
        f"The body may hold {limits.max_json_values} JSON values at most.", code="json_too_large"
    )


def read_headers(scope: Scope) -> dict[bytes, bytes]:
    """Return the request's headers by lower-case name.

    Raises:
        InvalidRequestError: a header that the stack acts on occurs twice. A proxy in front, for example one that checks
            keys, may have used the other value.
    """
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in _SINGLE_HEADERS and found.get(name, value) != value:
            shown = name.decode("latin-1")
            raise InvalidRequestError(f"The header {shown} has two values; send it once.", param=shown)
        found[name] = value
    return found


def read_request_id(headers: Mapping[bytes, bytes]) -> str:
    """Return the client's `x-request-id` if it is safe to log and send back, otherwise a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return uuid.uuid4().hex
