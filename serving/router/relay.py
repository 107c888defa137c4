"""One request to one replica, and its answer back to the client as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from serving.directory import ReplicaRecord
from serving.errors import InternalError, ReplicaConnectError, ReplicaTimeoutError, ReplicaUnreachableError, from_engine
from serving.router.reply import Reply
from serving.router.requests import RoutedRequest, blame
from serving.router.usage import StreamAnnotator, UsageNotes, annotate_answer
from serving.router_settings import RouterSettings

_MAX_ERROR_BYTES = 256 * 1024
_USAGE_TIMEOUT = aiohttp.ClientTimeout(total=5, sock_connect=1)


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

    async def relay(
        self, request: RoutedRequest, request_id: str, replica: ReplicaRecord, notes: UsageNotes, reply: Reply
    ) -> None:
        """Ask the replica and send its answer on.

        Cancelling this closes the connection to the replica, on which vLLM aborts the request.

        Raises:
            ServingError: the reply has not begun (a retryable error may be tried on another replica), or it is a
                stream that broke, which is left without its end.
        """
        async with self._ask(request, request_id, replica) as upstream:
            if upstream.status >= 400:
                raise blame(request, from_engine(upstream.status, await _read_error(upstream)))
            if request.is_stream:
                await _relay_stream(upstream, StreamAnnotator(notes, shows_usage=request.wants_stream_usage), reply)
            else:
                body = annotate_answer(await upstream.read(), notes)
                await reply.send_body(200, body)

    async def fetch_usage(self, replica: ReplicaRecord, request_id: str) -> dict[str, Any] | None:
        """What the replica's engine counted for a request whose answer did not say; None when it cannot tell."""
        assert self._session is not None
        url = f"{replica.base_url}/usage/{request_id}"
        try:
            async with self._session.get(url, headers=self._headers, timeout=_USAGE_TIMEOUT) as answer:
                found = orjson.loads(await answer.read()) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError):
            return None
        return found if isinstance(found, dict) else None

    @contextlib.asynccontextmanager
    async def _ask(
        self, request: RoutedRequest, request_id: str, replica: ReplicaRecord
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise InternalError("The router has not started.")
        url = replica.base_url + request.path
        headers = {**self._headers, "x-request-id": request_id}
        try:
            async with self._session.post(url, data=request.body, headers=headers) as upstream:
                yield upstream
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
            raise ReplicaConnectError("The replica cannot be reached.") from error
        except TimeoutError as error:
            raise ReplicaTimeoutError("The model did not answer in time.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaUnreachableError("The replica that ran this request was lost.") from error


async def _relay_stream(upstream: aiohttp.ClientResponse, annotator: StreamAnnotator, reply: Reply) -> None:
    """Send frames as they come. Nothing is sent before the first, so that until then another replica may be tried."""
    chunks = upstream.content.iter_any()
    out = annotator.feed(await anext(chunks, b""))
    await reply.start_stream()
    if out:
        await reply.write(out)
    async for chunk in chunks:
        out = annotator.feed(chunk)
        if out:
            await reply.write(out)
    last = annotator.flush()
    if not annotator.is_done:
        raise ReplicaUnreachableError("The replica ended this answer before it was complete.")
    await reply.end(last)


async def _read_error(upstream: aiohttp.ClientResponse) -> Any:
    """The engine's error answer as decoded JSON, None when it is something else."""
    body = b""
    while len(body) < _MAX_ERROR_BYTES and (part := await upstream.content.read(_MAX_ERROR_BYTES)):
        body += part
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
