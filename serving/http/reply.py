"""The answer to one request, on its way to the client."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Mapping
from types import MappingProxyType

import orjson
from starlette.types import Message, Send

from serving.errors import ServingError

_JSON = (b"content-type", b"application/json")
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would wait until its buffer is full
)


_LARGE_BYTES = 32 * 1024
"""From this size on a whole answer is compressed, if its client asks for that: below it the time is worth more."""
_GZIP_LEVEL = 1
_GZIPPED = ((b"content-encoding", b"gzip"), (b"vary", b"accept-encoding"))


class Reply:
    """Sends the answer and remembers how far it has come. `headers` go with it, whatever it is."""

    __slots__ = ("_asked", "_send", "first_byte_ns", "headers", "is_complete", "is_stream", "status")

    def __init__(
        self,
        send: Send,
        headers: list[tuple[bytes, bytes]] | None = None,
        asked: Mapping[bytes, bytes] = MappingProxyType({}),
    ) -> None:
        """`asked` are the request's headers, by lower-case name."""
        self._send = send
        self._asked = asked
        self.headers = headers if headers is not None else []
        self.status = 0
        """0 until the answer has begun: only then may something else be tried."""
        self.first_byte_ns = 0
        self.is_complete = False
        self.is_stream = False
        """Whether it is one of server-sent events, so that an error can still be told."""

    @property
    def has_begun(self) -> bool:
        return self.status != 0

    async def start_stream(self) -> None:
        """Begin a stream of server-sent events."""
        self.is_stream = True
        self._begin(200)
        await self._send_head([*_STREAM_HEADERS, *self.headers])

    async def write(self, data: bytes) -> None:
        """A piece of the stream; waits while the client takes no more."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """The last piece of a stream that is whole with it."""
        await self._end(data)

    async def end_with_error(self, error: ServingError) -> None:
        """Tell of an error in the only way left once a stream has begun: an event, and no `[DONE]` after it."""
        await self._end(b"data: " + orjson.dumps(error.body()) + b"\n\n")

    async def send_body(
        self, status: int, body: bytes, extra: Mapping[str, str] | None = None, content_type: bytes = _JSON[1]
    ) -> None:
        """A whole answer."""
        more = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (extra or {}).items()]
        head = [(_JSON[0], content_type), *self.headers, *more]
        if len(body) >= _LARGE_BYTES and b"gzip" in self._asked.get(b"accept-encoding", b""):
            body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL)
            head += _GZIPPED
        self._begin(status)
        await self._send_head([(b"content-length", b"%d" % len(body)), *head])
        await self._end(body)

    async def send_empty(self, status: int) -> None:
        """An answer without a body, such as 204."""
        self._begin(status)
        await self._send_head(self.headers)
        await self._end(b"")

    async def send_error(self, error: ServingError) -> None:
        """An error in OpenAI's shape."""
        await self.send_body(error.http_status, orjson.dumps(error.body()), error.headers)

    async def pass_on(self, message: Message) -> None:
        """A message that an app inside has made, as it is but for the headers."""
        if message["type"] == "http.response.start":
            self.is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            self._begin(message["status"])
            await self._send_head([*message["headers"], *self.headers])
            return
        await self._send(message)
        if not message.get("more_body", False):
            self.is_complete = True

    def _begin(self, status: int) -> None:
        self.status = status
        self.first_byte_ns = time.time_ns()

    async def _send_head(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})

    async def _end(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self.is_complete = True
