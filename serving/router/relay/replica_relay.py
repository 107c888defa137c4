"""Sends a request to a replica, and the answer to the client as it arrives."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson

from serving.cluster.directory import ReplicaRecord
from serving.errors import InternalError, ReplicaUnreachableError, ServingError, UpstreamError, from_engine
from serving.http.reply import Reply
from serving.router.accounting.answer_usage import StreamAnnotator, UsageNotes, annotate_answer
from serving.router.relay.http_client import Answer, Upstream
from serving.router.request.engine_refusals import rewrite_refusal
from serving.router.request.parsing import RoutedRequest, explain_refusal
from serving.settings.router import RouterSettings

logger = logging.getLogger(__name__)

_MAX_LOGGED_CHARS = 500
_MAX_ERROR_BYTES = 256 * 1024
_USAGE_TIMEOUT_S = 5.0
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Relay:
    """Owns the connections to the replicas. One per router process."""

    def __init__(self, router: RouterSettings, api_key: str | None) -> None:
        self._router = router
        # Answers are inspected and passed on as they arrive, so they must not be compressed.
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._upstream: Upstream | None = None

    async def start(self) -> None:
        """Must run inside the event loop that relays."""
        # Admission bounds the requests in flight; a limit on connections would only add a second, invisible queue.
        router = self._router
        self._upstream = Upstream(connect_timeout_s=router.connect_timeout_s, read_timeout_s=router.read_timeout_s)

    async def close(self) -> None:
        if self._upstream is not None:
            await self._upstream.close()

    async def relay(
        self,
        request: RoutedRequest,
        request_id: str,
        replica: ReplicaRecord,
        notes: UsageNotes,
        reply: Reply,
        trace_headers: Mapping[str, str] = _NO_HEADERS,
    ) -> bytes:
        """Send a request to a replica, and all of its answer but the last bytes to the client.

        Cancelling this closes the connection to the replica, on which vLLM aborts the request.

        Returns:
            What is left to be sent: the end of a stream that has begun, or the whole body of any other answer. By then
            the replica has answered completely.

        Raises:
            ServingError: the replica failed or refused. If the reply has begun, its stream is left without an end; if
                not, a retryable error may be retried on another replica.
        """
        if self._upstream is None:
            raise InternalError("The router has not started.")
        headers = {**self._headers, "x-request-id": request_id, **trace_headers}
        url = replica.base_url + request.path
        async with self._upstream.request("POST", url, headers, request.body) as answer:
            if answer.status >= 400:
                raise await _read_refusal(request, answer)
            if request.is_stream:
                shows, in_last = request.wants_stream_usage, request.usage_in_last_chunk
                annotator = StreamAnnotator(notes, shows_usage=shows, usage_in_last=in_last)
                return await _relay_stream(request, answer, annotator, reply)
            return annotate_answer(await answer.read(), notes)

    async def ask(self, replica: ReplicaRecord, path: str, body: bytes, request_id: str, *, is_chat: bool) -> bytes:
        """Ask a replica for something that generates nothing, and return its answer.

        Raises:
            ServingError: the replica failed or refused.
        """
        if self._upstream is None:
            raise InternalError("The router has not started.")
        headers = {**self._headers, "x-request-id": request_id}
        async with self._upstream.request("POST", replica.base_url + path, headers, body) as answer:
            if answer.status >= 400:
                raise rewrite_refusal(from_engine(answer.status, await _read_error(answer)), is_chat=is_chat)
            return await answer.read()

    async def fetch_usage(self, replica: ReplicaRecord, request_id: str) -> dict[str, Any] | None:
        """What the replica's engine counted for a request whose answer did not say; None if it cannot be had."""
        assert self._upstream is not None
        url = f"{replica.base_url}/usage/{request_id}"
        try:
            async with self._upstream.request("GET", url, self._headers, read_timeout_s=_USAGE_TIMEOUT_S) as answer:
                found = orjson.loads(await answer.read()) if answer.status == 200 else None
        except (UpstreamError, orjson.JSONDecodeError):
            return None
        return found if isinstance(found, dict) else None


async def _relay_stream(request: RoutedRequest, answer: Answer, annotator: StreamAnnotator, reply: Reply) -> bytes:
    """Send frames as they arrive. Nothing is sent before the first one, so that another replica may be tried until
    then. Returns the final frames, which may be sent only when the request is accounted for."""
    out = annotator.feed(await answer.read_some())
    if annotator.error is not None:
        raise explain_refusal(request, annotator.error)
    await reply.start_stream()
    if out:
        await reply.write(out)
    while chunk := await answer.read_some():
        out = annotator.feed(chunk)
        if out:
            await reply.write(out)
    last = annotator.flush()
    if not annotator.is_done:
        if annotator.error is not None:
            raise explain_refusal(request, annotator.error)
        raise ReplicaUnreachableError("The replica ended this answer before it was complete.")
    return last


async def _read_refusal(request: RoutedRequest, answer: Answer) -> ServingError:
    """An error answer as the client is told of it. The engine's words stay here: they go to the log."""
    found = await _read_error(answer)
    error = explain_refusal(request, from_engine(answer.status, found))
    if answer.status < 500:
        logger.info("an engine refused a request with %d: %s", answer.status, str(found)[:_MAX_LOGGED_CHARS])
    return error


async def _read_error(answer: Answer) -> Any:
    """The engine's error answer as decoded JSON; None if it is something else."""
    try:
        return orjson.loads(await answer.read(_MAX_ERROR_BYTES))
    except orjson.JSONDecodeError:
        return None
