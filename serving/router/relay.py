"""One request to one replica, and its answer back to the client as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import orjson
from starlette.types import Send

from serving.directory import ReplicaRecord
from serving.errors import InternalError, ReplicaTimeoutError, ReplicaUnreachableError, ServingError, from_engine
from serving.router.requests import RoutedRequest
from serving.router.usage import StreamAnnotator, UsageNotes, annotate_answer
from serving.router_settings import RouterSettings

_MAX_ERROR_BYTES = 256 * 1024
_JSON = b"application/json"
_EVENT_STREAM = b"text/event-stream; charset=utf-8"


class Relay:
    """Keeps the connections to the replicas. One per router process."""

    def __init__(self, router: RouterSettings, api_key: str | None) -> None:
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=router.connect_timeout_s, sock_read=router.read_timeout_s
        )
        # Answers are passed on and looked into as they come, so they must not be compressed.
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Must run inside the event loop that relays."""
        # Admission bounds what is under way; a limit on connections here would only add a second, invisible queue.
        connector = aiohttp.TCPConnector(limit=0, force_close=False, keepalive_timeout=15)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, auto_decompress=False)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def relay(self, request: RoutedRequest, replica: ReplicaRecord, notes: UsageNotes, send: Send) -> None:
        """Ask the replica and send its answer on.

        Cancelling this closes the connection to the replica, on which vLLM aborts the request.

        Raises:
            ServingError: nothing was sent to the client yet. A retryable one may be tried on another replica.
        """
        async with self._ask(request, replica) as upstream:
            if upstream.status >= 400:
                raise from_engine(upstream.status, await _read_error(upstream))
            if request.is_stream:
                await _relay_stream(upstream, notes if request.wants_stream_usage else None, send)
            else:
                body = annotate_answer(await upstream.read(), notes)
                await send_body(send, 200, body)

    @contextlib.asynccontextmanager
    async def _ask(self, request: RoutedRequest, replica: ReplicaRecord) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise InternalError("The router has not started.")
        url = replica.base_url + request.path
        try:
            async with self._session.post(url, data=request.body, headers=self._headers) as upstream:
                yield upstream
        except aiohttp.ConnectionTimeoutError as error:
            raise ReplicaUnreachableError("The replica cannot be reached.") from error
        except TimeoutError as error:
            raise ReplicaTimeoutError("The model did not answer in time.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaUnreachableError("The replica that ran this request was lost.") from error


async def _relay_stream(upstream: aiohttp.ClientResponse, notes: UsageNotes | None, send: Send) -> None:
    """Send frames as they come. Until the first one is there nothing was sent, and another replica may be tried;
    after it an error is told as an event, since the status is out.

    Raises:
        ServingError: the replica was lost before its first byte.
    """
    annotator = StreamAnnotator(notes)
    chunks = upstream.content.iter_any()
    out = annotator.feed(await anext(chunks, b""))
    await send({"type": "http.response.start", "status": 200, "headers": _headers(_EVENT_STREAM)})
    try:
        if out:
            await send({"type": "http.response.body", "body": out, "more_body": True})
        async for chunk in chunks:
            out = annotator.feed(chunk)
            if out:
                await send({"type": "http.response.body", "body": out, "more_body": True})
        last = annotator.flush()
    except TimeoutError:
        last = _error_event(ReplicaTimeoutError("The model fell silent in the middle of this answer."))
    except (aiohttp.ClientError, OSError):
        last = _error_event(ReplicaUnreachableError("The replica that ran this request was lost in the middle of it."))
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _read_error(upstream: aiohttp.ClientResponse) -> Any:
    """The engine's error answer as decoded JSON, None when it is something else."""
    body = b""
    while len(body) < _MAX_ERROR_BYTES and (part := await upstream.content.read(_MAX_ERROR_BYTES)):
        body += part
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _error_event(error: ServingError) -> bytes:
    """A server-sent event that tells of an error; no `[DONE]` follows it."""
    return b"data: " + orjson.dumps(error.body()) + b"\n\n"


def _headers(content_type: bytes, length: int | None = None) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", content_type)]
    if length is None:
        return [*headers, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    return [*headers, (b"content-length", b"%d" % length)]


async def send_body(send: Send, status: int, body: bytes, extra: Mapping[str, str] | None = None) -> None:
    """A whole JSON answer."""
    headers = _headers(_JSON, len(body)) + [(name.encode(), value.encode()) for name, value in (extra or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, error: ServingError) -> None:
    """An error in OpenAI's shape."""
    await send_body(send, error.http_status, orjson.dumps(error.body()), error.headers)


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
