"""Guards on what a connection does before there is a request for the ASGI app, and on a client that takes no answer.

uvicorn leaves the size of headers, the time a client takes for them and a client that stops reading to a proxy in
front; here they are bounded, and what is refused is told in OpenAI's error shape. llhttp below already refuses
ambiguous framing (Content-Length twice or together with Transfer-Encoding, bare LF, folded headers); what it lets
through of RFC 9112, sections 3.2 and 6.1, is refused here.

Built on methods of uvicorn's protocol class that are no public interface. Written for uvicorn 0.54; nothing else in the
project knows them, and tests/unit/http/test_protocol.py fails when one moves. Nothing is done per piece of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sys
import termios
from typing import Any, ClassVar

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import HeadersTooLargeError, InvalidRequestError, RequestTimeoutError, ServingError
from serving.http.joined_writes import JoiningTransport, WriteRound
from serving.settings.router import LimitSettings

_CHUNK_OVERHEAD = 8
"""Bytes of framing per byte of a chunked body that a client may send: `1\\r\\nx\\r\\n` is six."""
_LINGER_S = 2.0
"""How long what a refused client still sends is taken and thrown away."""


class JoiningProtocol(HttpToolsProtocol):
    """One connection, whose writes are joined. Made into a class of one server by `build_protocol`, since uvicorn makes
    the instances."""

    writes: ClassVar[WriteRound]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoiningTransport(transport, self.writes))


class GuardedProtocol(JoiningProtocol):
    """One connection from outside, within limits."""

    limits: ClassVar[LimitSettings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_headers = True
        self._num_header_bytes = 0
        self._num_raw_bytes = 0
        self._num_body_bytes = 0
        self._is_deaf = False
        self._refusal: ServingError | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_timer = self.loop.call_later(self.limits.header_timeout_s, self._end_slow_headers)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf or self.transport.is_closing():
            return
        if not self._is_in_headers:
            self._num_raw_bytes += len(data)
            super().data_received(data)
            if self._num_raw_bytes > 2 * self.limits.max_header_bytes + _CHUNK_OVERHEAD * self._num_body_bytes:
                self._check_framing()
            return
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.limits.header_timeout_s, self._end_slow_headers)
        room = self.limits.max_header_bytes - self._num_header_bytes
        self._num_header_bytes += len(data)
        if len(data) <= room:
            super().data_received(data)
            return
        super().data_received(data[:room])
        self._go_on_after_headers(data[room:])

    def _go_on_after_headers(self, data: bytes) -> None:
        """Whatever allowed headers would be longer than was read."""
        if self._is_in_headers and not self._is_deaf:
            self._refuse(HeadersTooLargeError(f"Headers may have {self.limits.max_header_bytes} bytes at most."))
        else:
            self.data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self.transport.is_closing():
            self._watch_writing()

    # What the parser calls; an exception out of these ends in `send_400_response`

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # A second request while the first is answered. uvicorn would queue it, and then no longer tell the first
            # that its client has left. RFC 9112, section 9.3.2, has clients ask again for what was not answered.
            self.cycle.keep_alive = False
            self._is_deaf = True
            return
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_headers and not self._is_deaf:  # trailers must not become headers: RFC 9110, section 6.5.1
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._check_headers()
        self._is_in_headers = False
        self._num_header_bytes = self._num_raw_bytes = self._num_body_bytes = 0
        self._stop_read_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_deaf:
            self._num_body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_deaf:
            self._is_in_headers = True
            self._stop_read_timer()
            super().on_message_complete()
            if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
                # The answer was quicker than the body, whose bytes have ended uvicorn's wait for the next request.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            self.cycle.more_body = False

    # What uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()  # until the answer is taken; a closed transport waits for that without end
        elif self.cycle.more_body:
            # A client that goes on sending what nobody reads: uvicorn's own timer ends at its first byte.
            self._read_timer = self.loop.call_later(self.limits.body_timeout_s, self._close)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def send_400_response(self, msg: str) -> None:
        """In OpenAI's shape, and never into the middle of an answer."""
        if not self._is_deaf:
            self._refuse(self._refusal or InvalidRequestError("This is not valid HTTP.", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Upgrade may be ignored (RFC 9110, section 7.8), but the parser reads nothing after it."""
        self._is_deaf = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # The guards

    def _check_headers(self) -> None:
        """Refuse what llhttp passes and RFC 9112 wants refused."""
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._raise_refusal("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
        if num_hosts != 1 and (num_hosts > 1 or version == "1.1"):
            self._raise_refusal("A request needs exactly one Host header.")
        if codings and (version == "1.0" or [coding.strip().lower() for coding in codings] != [b"chunked"]):
            self._raise_refusal("The only Transfer-Encoding that is read is chunked, in HTTP/1.1.")
        if self.parser.should_upgrade():
            lengths = [value for name, value in self.headers if name == b"content-length"]
            if codings or (lengths and lengths != [b"0"]):
                self._raise_refusal("A request with a body cannot ask for an upgrade.")

    def _check_framing(self) -> None:
        """Chunk extensions and trailers have no other bound; a body by Content-Length always passes."""
        if not self._is_in_headers and not self._is_deaf and not self.transport.is_closing():
            self._refuse(InvalidRequestError("The chunks of the body are mostly framing.", code="invalid_http"))

    def _raise_refusal(self, reason: str) -> None:
        self._refusal = InvalidRequestError(reason, code="invalid_http")
        raise self._refusal

    def _refuse(self, error: ServingError) -> None:
        """Answer and hang up; what the client still sends is not read."""
        self._is_deaf = True
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            if cycle is not None:
                cycle.disconnected = True
                cycle.message_event.set()
            self.transport.write(_render(error))
            if self.transport.can_write_eof():
                # Closed at once, a client that is still sending would see a reset instead of the answer.
                self.transport.write_eof()
                self._stop_read_timer()
                self._read_timer = self.loop.call_later(_LINGER_S, self._close)
                return
        self._close()

    def _end_slow_headers(self) -> None:
        self._read_timer = None
        if self._num_header_bytes:
            seconds = self.limits.header_timeout_s
            self._refuse(RequestTimeoutError(f"The headers did not come within {seconds:g} seconds."))
        else:
            self._close()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
        self._watch_writing()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _watch_writing(self) -> None:
        if self._write_timer is None:
            left = self._count_untaken()
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._check_writing, left)

    def _check_writing(self, before: int) -> None:
        """Drop a client that has taken nothing since the last look; a slow one has its answer."""
        self._write_timer = None
        if self._count_untaken() >= before:
            self.transport.abort()
        else:
            self._watch_writing()

    def _count_untaken(self) -> int:
        """Bytes that the client's machine has not acknowledged, ours and the kernel's: the kernel asks for more only
        when a third of its megabytes is free again, which says nothing of a slow client for a long time."""
        queued = bytearray(4)
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)


def build_protocol(limits: LimitSettings | None) -> type[asyncio.Protocol]:
    """What `uvicorn.Config(http=...)` takes, for one server; without limits, for one that only the stack talks to."""
    if limits is None:
        return type("ServerProtocol", (JoiningProtocol,), {"writes": WriteRound()})
    return type("LimitedProtocol", (GuardedProtocol,), {"writes": WriteRound(), "limits": limits})


def _render(error: ServingError) -> bytes:
    body = orjson.dumps(error.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
    return b"".join([STATUS_LINE[error.http_status], *lines, b"\r\n", body])
