"""Protects connections before a request reaches the ASGI app, and against clients that do not read their answer.

uvicorn leaves header size, slow headers and clients that stop reading to a proxy in front. Here they are limited, and
refusals have OpenAI's error shape. llhttp already refuses ambiguous framing (two Content-Length headers, or one
together with Transfer-Encoding, bare LF, folded headers); the rest of RFC 9112, sections 3.2 and 6.1, is checked here.

Overrides private methods of uvicorn's protocol class. Written for uvicorn 0.54; no other module uses them, and
tests/unit/http/test_protocol.py fails when one changes. No work is added per piece of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sys
import termios
from collections.abc import Iterator
from typing import Any, ClassVar

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import HeadersTooLargeError, InvalidRequestError, RequestTimeoutError, ServingError
from serving.http.joined_writes import JoiningTransport, WriteRound
from serving.settings.router import LimitSettings

_CHUNK_OVERHEAD = 8
"""Most bytes of framing per byte of a chunked body: `1\\r\\nx\\r\\n` is six."""
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_PROBES_S = (0.05, 0.5, 2.0, 5.0)
"""Pauses between interim answers to a client that sends no more; the last one from then on."""
_LINGER_S = 2.0
"""How long data from a refused client is read and discarded."""


class _AnyLength(int):
    """The length of a body that ends with its connection: nothing is longer or shorter."""

    def __lt__(self, other: int) -> bool:
        return False

    def __sub__(self, other: int) -> _AnyLength:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class JoiningProtocol(HttpToolsProtocol):
    """One connection with coalesced writes. `build_protocol` derives a class per server, since uvicorn creates the
    instances."""

    writes: ClassVar[WriteRound]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoiningTransport(transport, self.writes))


class GuardedProtocol(JoiningProtocol):
    """One connection from an untrusted client, within limits."""

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
        self._probe_timer: asyncio.TimerHandle | None = None

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_timer = self.loop.call_later(self.limits.header_timeout_s, self._end_slow_headers)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._read_timer, self._write_timer, self._probe_timer):
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
        """Refuse headers that are longer than allowed."""
        if self._is_in_headers and not self._is_deaf:
            self._refuse(HeadersTooLargeError(f"Headers may have {self.limits.max_header_bytes} bytes at most."))
        else:
            self.data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. It may have closed the connection, or only its half, and wait for its answer.

        Only writing tells the two apart: what is written to a closed connection is answered with a reset, and the next
        write fails. So until the answer begins, interim ones are sent, which clients ignore (RFC 9110, section 15.2).
        In the middle of an answer nothing can be put in between, and the client counts as gone.
        """
        cycle = self.cycle
        is_asking = self._is_in_headers and not self._num_header_bytes  # the whole request has arrived, and no other
        if self._is_deaf or cycle is None or cycle.response_started or not is_asking:
            return False
        cycle.keep_alive = False
        if self.scope["http_version"] == "1.1":
            self._probe(iter(_PROBES_S))
        return True

    def _probe(self, delays_s: Iterator[float]) -> None:
        if self.cycle.response_started or self.transport.is_closing():
            return
        self.transport.write(_INTERIM)
        delay_s = next(delays_s, _PROBES_S[-1])
        self._probe_timer = self.loop.call_later(delay_s, self._probe, delays_s)

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

    # Called by the parser; an exception from these ends in `send_400_response`

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # A second request while the first is being answered. uvicorn would queue it, and then not notify the first
            # when its client disconnects. Clients repeat requests that were not answered (RFC 9112, section 9.3.2).
            self.cycle.keep_alive = False
            self._is_deaf = True
            return
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_headers and not self._is_deaf:  # trailers must not become headers (RFC 9110, section 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._check_headers()
        self._is_in_headers = False
        self._num_header_bytes = self._num_raw_bytes = self._num_body_bytes = 0
        self._stop_read_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # uvicorn would use the chunked coding, which HTTP/1.0 does not have; the connection's end is the body's.
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _AnyLength()

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
                # The answer was complete before the body, whose bytes ended uvicorn's wait for the next request.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            self.cycle.more_body = False

    # Called by uvicorn

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()  # until the client reads the answer; a closed transport waits for that without limit
        elif self.cycle.more_body:
            # For a client that keeps sending data that is not read: uvicorn's own timer ends at its first byte.
            self._read_timer = self.loop.call_later(self.limits.body_timeout_s, self._close)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def send_400_response(self, msg: str) -> None:
        """Answer in OpenAI's error shape, but never in the middle of another answer."""
        if not self._is_deaf:
            self._refuse(self._refusal or InvalidRequestError("This is not valid HTTP.", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Close after an upgrade request: it may be ignored (RFC 9110, section 7.8), but the parser reads nothing after
        it."""
        self._is_deaf = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # The guards

    def _check_headers(self) -> None:
        """Refuse what llhttp accepts although RFC 9112 requires an error."""
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._raise_refusal("Use HTTP/1.1 or HTTP/1.0; other versions are not supported.")
        if num_hosts != 1 and (num_hosts > 1 or version == "1.1"):
            self._raise_refusal("Send exactly one Host header.")
        if codings and (version == "1.0" or [coding.strip().lower() for coding in codings] != [b"chunked"]):
            self._raise_refusal("Transfer-Encoding must be chunked, in HTTP/1.1; no other is supported.")
        if self.parser.should_upgrade():
            lengths = [value for name, value in self.headers if name == b"content-length"]
            if codings or (lengths and lengths != [b"0"]):
                self._raise_refusal("A request with a body cannot ask for an upgrade.")

    def _check_framing(self) -> None:
        """Limit chunk extensions and trailers, which have no other limit. A body with Content-Length always passes."""
        if not self._is_in_headers and not self._is_deaf and not self.transport.is_closing():
            self._refuse(InvalidRequestError("The chunks of the body are mostly framing.", code="invalid_http"))

    def _raise_refusal(self, reason: str) -> None:
        self._refusal = InvalidRequestError(reason, code="invalid_http")
        raise self._refusal

    def _refuse(self, error: ServingError) -> None:
        """Answer and close; further data from the client is not parsed."""
        self._is_deaf = True
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            if cycle is not None:
                cycle.disconnected = True
                cycle.message_event.set()
            self.transport.write(_render(error))
            if self.transport.can_write_eof():
                # After an immediate close a client that is still sending would see a reset instead of the answer.
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
        """Disconnect a client that has read nothing since the last check. A slow client is left alone."""
        self._write_timer = None
        if self._count_untaken() >= before:
            self.transport.abort()
        else:
            self._watch_writing()

    def _count_untaken(self) -> int:
        """Count the bytes that the client's machine has not acknowledged, in our buffer and the kernel's. The transport
        alone is not enough: the kernel asks for more only when a third of its megabytes is free again."""
        queued = bytearray(4)
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)


def build_protocol(limits: LimitSettings | None) -> type[asyncio.Protocol]:
    """Build the class for `uvicorn.Config(http=...)` of one server; without limits for internal servers."""
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
