"""A minimal keep-alive HTTP/1.1 client for replicas, optimised for small streamed chunks.

A general-purpose client spends most of its time per chunk on features that a router inside a stack does not need: a
stream reader with its own limits, a timer reset at every read, cookies, redirects, content codings. Here what is read
from the socket goes through llhttp (`httptools`, the parser that uvicorn uses on the other side) and wakes the
coroutine that waits for it. One timer per request detects silence by looking at the time of the last read.

Every failure is a ServingError: callers need not know about sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

from serving.errors import InternalError, ReplicaConnectError, ReplicaTimeoutError, ReplicaUnreachableError

_KEEP_S = 15.0
"""How long an idle connection is kept: well below the keep-alive timeout of the stack's servers (75 s)."""
HIGH_WATER_BYTES = 256 * 1024
"""With more than this unread, reading from the socket pauses, and so the engine, until the data has been taken."""
_JOINED_BYTES = 64 * 1024
"""A body up to this size is written together with its head."""

Address = tuple[str, int]


class Answer:
    """A replica's answer whose headers have arrived."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    @property
    def status(self) -> int:
        return self._connection.status

    async def read_some(self) -> bytes:
        """What has arrived of the body since the last call, at least one byte; empty at its end.

        Raises:
            ReplicaUnreachableError: the connection was lost before the body was complete.
            ReplicaTimeoutError: nothing arrived within the read timeout.
        """
        return await self._connection.read_some()

    async def read(self, max_bytes: int | None = None) -> bytes:
        """The whole body, or the beginning of one that is longer than `max_bytes`. Raises what `read_some` raises."""
        parts: list[bytes] = []
        size = 0
        while part := await self._connection.read_some():
            parts.append(part)
            size += len(part)
            if max_bytes is not None and size >= max_bytes:
                break
        return b"".join(parts)[:max_bytes]


class Upstream:
    """One router process's connections to all replicas."""

    def __init__(self, *, connect_timeout_s: float, read_timeout_s: float) -> None:
        """`read_timeout_s` is the longest silence of a replica, before its answer and between two pieces of it."""
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._idle: dict[Address, deque[_Connection]] = {}
        self._busy: set[_Connection] = set()

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        read_timeout_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request and wait for the headers of the answer.

        Leaving the context before the body has been read to its end closes the connection, cancelled or not: that is
        how an engine learns that the answer is no longer wanted.

        Args:
            method: GET or POST.
            url: `http://host:port/path`.
            headers: without Host and Content-Length.
            body: sent as a whole.
            read_timeout_s: overrides the client's.

        Raises:
            ReplicaConnectError: the replica does not accept a connection.
            ReplicaUnreachableError: it closed the connection, or does not speak HTTP.
            ReplicaTimeoutError: it did not answer in time.
            InternalError: a header that would break the request's framing.
        """
        address, host, path = _split(url)
        head = _render_head(method, host, path, headers, len(body))
        connection = self._take(address) or await self._connect(address)
        self._busy.add(connection)
        try:
            connection.send(head, body, self._read_timeout_s if read_timeout_s is None else read_timeout_s)
            await connection.wait_for_headers()
            yield Answer(connection)
        finally:
            self._busy.discard(connection)
            if connection.finish():
                self._keep(address, connection)

    async def close(self) -> None:
        """Close every connection; requests in flight fail."""
        for connection in [*self._busy, *(one for kept in self._idle.values() for one in kept)]:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports report their end in the loop's next iteration

    def _take(self, address: Address) -> _Connection | None:
        """The most recently used connection, if it is still usable."""
        kept = self._idle.get(address)
        now_s = asyncio.get_running_loop().time()
        while kept:
            connection = kept.pop()
            if connection.is_open and now_s - connection.idle_since_s < _KEEP_S:
                return connection
            connection.abort()
        return None

    def _keep(self, address: Address, connection: _Connection) -> None:
        kept = self._idle.setdefault(address, deque())
        kept.append(connection)
        oldest_s = connection.idle_since_s - _KEEP_S
        while not kept[0].is_open or kept[0].idle_since_s < oldest_s:
            kept.popleft().abort()
            if not kept:
                del self._idle[address]
                return

    async def _connect(self, address: Address) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: _Connection(loop), *address)
        except (TimeoutError, OSError) as error:
            raise ReplicaConnectError("The replica cannot be reached.") from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, used by one request at a time. The parser calls the methods named `on_...`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self.status = 0
        self.idle_since_s = 0.0
        self._parser: httptools.HttpResponseParser | None = None
        """None while no answer is expected."""
        self._pieces: list[bytes] = []
        self._num_unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._failure: ReplicaUnreachableError | ReplicaTimeoutError | None = None
        self._has_headers = False
        self._is_framed = False
        self._is_whole = False
        self._is_paused = False
        self._keeps_alive = False
        self._read_timeout_s = 0.0
        self._last_read_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # Called by `Upstream`

    def send(self, head: bytes, body: bytes, read_timeout_s: float) -> None:
        """Begin a request."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._has_headers = self._is_framed = self._is_whole = self._keeps_alive = False
        self._failure = None
        self._read_timeout_s = read_timeout_s
        self._last_read_s = self._loop.time()
        self._timer = self._loop.call_at(self._last_read_s + read_timeout_s, self._look_for_silence)
        if len(body) <= _JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def finish(self) -> bool:
        """End the request. Returns whether the connection may be reused; otherwise it is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        is_good = self._is_whole and self._keeps_alive and not self._pieces and self._failure is None and self.is_open
        self._parser = None
        self._pieces.clear()
        self._num_unread = 0
        self.idle_since_s = self._loop.time()
        if not is_good:
            self.abort()
        return is_good

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Awaited by the request

    async def wait_for_headers(self) -> None:
        while not self._has_headers:
            if self._failure is not None:
                raise self._failure
            await self._wait()

    async def read_some(self) -> bytes:
        while not self._pieces:
            if self._is_whole:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._num_unread = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._last_read_s = self._loop.time()
            self._transport.resume_reading()
        return data

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: ReplicaUnreachableError | ReplicaTimeoutError) -> None:
        if self._failure is None and not self._is_whole:
            self._failure = failure
        self._wake()

    def _look_for_silence(self) -> None:
        assert self._parser is not None
        due_s = self._last_read_s + self._read_timeout_s
        if self._is_paused:  # the client is slow, not the replica
            due_s = self._loop.time() + self._read_timeout_s
        elif self._loop.time() >= due_s:
            self._timer = None
            self._fail(ReplicaTimeoutError("The model did not answer in time."))
            return
        self._timer = self._loop.call_at(due_s, self._look_for_silence)

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's classes do not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._is_whole:
            self.abort()  # an answer without a request
            return
        self._last_read_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(ReplicaUnreachableError("The replica does not speak HTTP."))
            self.abort()
            return
        except httptools.HttpParserUpgrade:
            self._fail(ReplicaUnreachableError("The replica changed the protocol."))
            self.abort()
            return
        self._wake()
        if self._num_unread > HIGH_WATER_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._parser is not None and self._has_headers and not self._is_framed and exc is None:
            self._is_whole = True  # a body that ends with its connection: RFC 9112, section 6.3
        self._transport = None
        self._fail(ReplicaUnreachableError("The replica that ran this request was lost."))

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._is_whole:
            raise ReplicaUnreachableError(
                "The replica sent an answer without a request."
            )  # the parser wraps it in its own error

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._is_framed = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._has_headers = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._num_unread += len(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._has_headers:  # otherwise it was an interim answer (1xx), and the real one follows
            self._is_whole = True
            self._keeps_alive = self._parser.should_keep_alive()


@lru_cache(maxsize=1024)
def _split(url: str) -> tuple[Address, str, str]:
    """The address, Host header and path of a URL."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise InternalError("Replicas are reached over plain http only.")
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return (parts.hostname, parts.port or 80), parts.netloc, path


def _render_head(method: str, host: str, path: str, headers: Mapping[str, str], num_body_bytes: int) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if method == "POST":
        lines.append(f"content-length: {num_body_bytes}")
    if any("\r" in line or "\n" in line for line in lines):
        raise InternalError("A header of this request cannot be passed on.")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
