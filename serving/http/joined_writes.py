"""One write to the socket for all that a connection was given in one round of the event loop, at the round's end.

A step of the engine makes a token for each of its sequences, and so a small write on each of their connections. To the
kernel the dear part of such a write is not the bytes: it is waking the process that waits for them, when it has gone
back to sleep since the last one. Written one right after another, the first wakes it and it finds the others waiting;
so less is spent on both sides. What is put off waits for tasks that are ready anyway, never for a timer.
"""

from __future__ import annotations

import asyncio
from typing import Any

_MAX_BYTES = 64 * 1024
"""With so much put off on one connection it is written at once, so that the transport's own limits still hold."""


class WriteRound:
    """The connections of one event loop that have something to write in the present round."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: list[JoiningTransport] = []

    def add(self, transport: JoiningTransport) -> None:
        """Have it flushed when the tasks that are ready now have run."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._flush)
        self._due.append(transport)

    def _flush(self) -> None:
        due, self._due = self._due, []
        for transport in due:
            transport.flush()


class JoiningTransport(asyncio.Transport):
    """A transport that puts its writes off to the end of the round; everything else is the given one's."""

    __slots__ = ("_inner", "_num_bytes", "_pieces", "_round")

    def __init__(self, inner: asyncio.Transport, round_: WriteRound) -> None:
        super().__init__()
        self._inner = inner
        self._round = round_
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes that change after the call must not be given."""
        if not data:
            return
        if not self._pieces:
            self._round.add(self)
        self._pieces.append(data)  # type: ignore[arg-type]  # `join` takes them all
        self._num_bytes += len(data)
        if self._num_bytes > _MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write now what was put off."""
        if not self._pieces:
            return
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._num_bytes = 0
        if not self._inner.is_closing():
            self._inner.write(data)

    def write_eof(self) -> None:
        self.flush()
        self._inner.write_eof()

    def close(self) -> None:
        self.flush()
        self._inner.close()

    def abort(self) -> None:
        self._pieces.clear()
        self._num_bytes = 0
        self._inner.abort()

    def get_write_buffer_size(self) -> int:
        return self._num_bytes + self._inner.get_write_buffer_size()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._inner.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._inner.get_write_buffer_limits()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner.get_protocol()
