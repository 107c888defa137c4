"""Coalesces all writes to a connection within one event-loop iteration into one send, at the iteration's end.

An engine step produces a token for each of its sequences, and so a small write on each of their connections. The
expensive part of such a write is not copying bytes but waking the process that waits for them, if it went back to sleep
since the last one. When the writes follow one another directly, the first wakes the reader and it finds the others
ready, which saves CPU on both sides (`python -m benchmarks.router --only writes`). A write is only delayed by tasks
that are ready to run, never by a timer.
"""

from __future__ import annotations

import asyncio
from typing import Any

_MAX_BYTES = 64 * 1024
"""A connection with more delayed bytes is flushed immediately, so that the transport's own limits still apply."""


class WriteRound:
    """The connections with delayed writes in the current iteration of one event loop."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: list[JoiningTransport] = []

    def add(self, transport: JoiningTransport) -> None:
        """Flush the transport after the tasks that are ready now have run."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._flush)
        self._due.append(transport)

    def _flush(self) -> None:
        due, self._due = self._due, []
        for transport in due:
            transport.flush()


class JoiningTransport(asyncio.Transport):
    """A transport that delays its writes to the end of the iteration and otherwise delegates to the given transport."""

    __slots__ = ("_inner", "_num_bytes", "_pieces", "_round")

    def __init__(self, inner: asyncio.Transport, round_: WriteRound) -> None:
        super().__init__()
        self._inner = inner
        self._round = round_
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write data soon. The caller must not change the bytes afterwards."""
        if not data:
            return
        if not self._pieces:
            self._round.add(self)
        self._pieces.append(data)  # type: ignore[arg-type]  # `join` takes them all
        self._num_bytes += len(data)
        if self._num_bytes > _MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the delayed data now."""
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
