"""The engine in this very process behind the router's checks: `router.mode: inline`.

The same auth, limits, admission and metering, but what was let in goes to the engine's own ASGI app by a call instead
of a connection. Each engine replica runs its own; HAProxy stands in front of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope

from serving.asgi.guards import ClientGoneError
from serving.asgi.reply import Reply
from serving.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.errors import EngineError, InternalError, NoReplicaError, ServingError, from_engine
from serving.router.app import RouterApp
from serving.router.dispatch import Slot
from serving.router.metering import Call
from serving.router.requests import RoutedRequest, blame
from serving.router.usage import StreamAnnotator, UsageNotes, annotate_answer
from serving.settings import Settings

ReadUsage = Callable[[str], dict[str, Any] | None]
"""What the engine counted for a request id, as `GET /usage/{request_id}` would tell it."""


class Inline:
    """The backend of `router.mode: inline`: an engine's ASGI app."""

    def __init__(self, app: ASGIApp, read_usage: ReadUsage, api_key: str | None) -> None:
        self._app = app
        self._read_usage = read_usage
        self._headers = [(b"content-type", b"application/json")]
        if api_key is not None:
            self._headers.append((b"authorization", b"Bearer " + api_key.encode()))

    async def start(self) -> None:
        """Nothing: whoever runs the replica runs the engine."""

    async def close(self) -> None:
        """Nothing."""

    async def fetch_usage(self, replica: ReplicaRecord, request_id: str) -> dict[str, Any] | None:
        return self._read_usage(request_id)

    async def answer(self, call: Call, slot: Slot, reply: Reply, receive: Receive) -> None:
        """Call the engine's app as its server would. It watches for the client's departure itself."""
        request, notes = call.understood()
        call.asked.append(slot.replica)
        call.unheard.append(slot.replica)
        notes.image_modes = slot.modes
        client = _Client(receive, request.body)
        answer = _Answer(request, notes, reply)
        try:
            scope = self._scope(request, call.request_id)
            if call.trace is None:
                await self._app(scope, client.receive, answer.take)
            else:
                with call.trace.trying(slot.replica.replica_id) as headers:
                    scope["headers"] += [(name.encode(), value.encode()) for name, value in headers.items()]
                    await self._app(scope, client.receive, answer.take)
            await answer.finish(has_client_left=client.has_left)
        except ServingError as error:
            if isinstance(error, EngineError | NoReplicaError):
                call.unheard.pop()  # it refused
            slot.fail(error)
            raise
        slot.succeed()

    def _scope(self, request: RoutedRequest, request_id: str) -> Scope:
        headers = [
            *self._headers,
            (b"content-length", b"%d" % len(request.body)),
            (b"x-request-id", request_id.encode()),
        ]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "server": None,
            "client": None,
        }


def build_inline_app(
    settings: Settings, app: ASGIApp, read_usage: ReadUsage, read_record: Callable[[], ReplicaRecord]
) -> RouterApp:
    """The router's app for one engine replica, which is all of its fleet.

    Args:
        settings: the whole of them.
        app: the engine's own.
        read_usage: what the engine counted for a request id.
        read_record: the replica as it describes itself now.
    """
    key = settings.engine.api_key
    latest = Snapshot((1, 0))

    def read_snapshot() -> Snapshot:
        nonlocal latest
        # While it drains it goes on with what waits here already; who comes new is HAProxy's to send elsewhere.
        record = dataclasses.replace(read_record(), state=ReplicaState.READY)
        if latest.records[:1] != (record,):
            latest = Snapshot((1, latest.version[1] + 1), (record,))
        return latest

    backend = Inline(app, read_usage, key.get_secret_value() if key is not None else None)
    return RouterApp(settings, read_snapshot, backend=backend, keeps_books=True)


class _Client:
    """Gives the app the body that was read already, and then whatever the client's connection says."""

    def __init__(self, receive: Receive, body: bytes) -> None:
        self._receive = receive
        self._body: bytes | None = body
        self.has_left = False

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        return message


class _Answer:
    """Takes what the app sends: streams go through the annotator, whole answers and errors are brought into shape."""

    def __init__(self, request: RoutedRequest, notes: UsageNotes, reply: Reply) -> None:
        self._request = request
        self._notes = notes
        self._reply = reply
        self._annotator = StreamAnnotator(
            notes, shows_usage=request.wants_stream_usage, usage_in_last=request.usage_in_last_chunk
        )
        self._status = 0
        self._is_stream = False
        self._parts: list[bytes] = []
        self._is_over = False
        self._take_body: Callable[[Message], Awaitable[None]] = self._take_whole

    async def take(self, message: Message) -> None:
        """The app's `send`."""
        if message["type"] == "http.response.body":
            await self._take_body(message)
        elif message["type"] == "http.response.start":
            self._status = message["status"]
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = self._status == 200 and content_type.startswith(b"text/event-stream")
            if self._is_stream:
                self._take_body = self._take_frames
                await self._reply.start_stream()

    async def _take_frames(self, message: Message) -> None:
        out = self._annotator.feed(message.get("body", b""))
        if out:
            await self._reply.write(out)
        self._is_over = not message.get("more_body", False)

    async def _take_whole(self, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        self._is_over = not message.get("more_body", False)

    async def finish(self, *, has_client_left: bool) -> None:
        """The app has returned.

        Raises:
            ClientGoneError: since its client had left.
            ServingError: its answer was an error, or is not complete.
        """
        last = self._annotator.flush()
        if has_client_left and not (self._is_stream and self._annotator.is_done):
            raise ClientGoneError
        if self._is_stream and self._is_over and self._annotator.is_done:
            await self._reply.end(last)
            return
        if self._is_stream or not self._is_over:
            raise self._annotator.error or InternalError("The engine ended this answer before it was complete.")
        body = b"".join(self._parts)
        if self._status >= 400:
            raise blame(self._request, from_engine(self._status, _decode(body)))
        await self._reply.send_body(200, annotate_answer(body, self._notes))


def _decode(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
