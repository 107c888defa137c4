"""Load from a process of its own: streamed chat requests over raw sockets, as light as Python gets.

`python -m benchmarks.router.load` sends `--requests` requests, `--concurrency` at a time on connections that are kept,
waits for the last byte of each and prints what came as one line of JSON. Every answer must be whole (`[DONE]`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, cast
from urllib.parse import urlsplit

import orjson
import typer
import uvloop

_EVENT = b"data: "
_DONE = b"data: [DONE]"
_END = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load has brought."""

    took_s: float
    num_chunks: int
    """Server-sent events, the role, the usage and `[DONE]` among them."""
    first_s: tuple[float, ...]
    """From sending a request to its first event, sorted."""

    @property
    def chunks_per_s(self) -> float:
        return self.num_chunks / self.took_s

    @property
    def first_p50_s(self) -> float:
        return self.first_s[len(self.first_s) // 2]


@dataclass(slots=True)
class _Tally:
    num_left: int
    num_chunks: int = 0
    first_s: list[float] = field(default_factory=list)


class _Client(asyncio.Protocol):
    """One connection, one request after another."""

    def __init__(self, request: bytes, tally: _Tally, finished: asyncio.Future[None]) -> None:
        self._request = request
        self._tally = tally
        self._finished = finished
        self._transport: asyncio.Transport | None = None
        self._sent_s = 0.0
        self._tail = b""
        self._is_first = True
        self._is_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own classes are no subclasses of asyncio's
        self._next()

    def _next(self) -> None:
        assert self._transport is not None
        if self._tally.num_left == 0:
            self._transport.close()
            if not self._finished.done():
                self._finished.set_result(None)
            return
        self._tally.num_left -= 1
        self._tail, self._is_first, self._is_done = b"", True, False
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        seen = self._tail + data
        num_events = seen.count(_EVENT) - self._tail.count(_EVENT)
        if num_events and self._is_first:
            self._is_first = False
            self._tally.first_s.append(time.perf_counter() - self._sent_s)
            if not seen.startswith(b"HTTP/1.1 200"):
                self._fail(f"answered {seen[:300]!r}")
        self._tally.num_chunks += num_events
        self._is_done = self._is_done or _DONE in seen
        if seen.endswith(_END):
            if not self._is_done:
                self._fail(f"ended without [DONE]: {seen[-300:]!r}")
            self._next()
        else:
            # Long enough for whatever may be cut in two, or for the status line; short enough to cost nothing.
            self._tail = seen if self._is_first else seen[-16:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._finished.done():
            self._fail(f"lost the connection: {exc!r} {self._tail[:300]!r}")

    def _fail(self, reason: str) -> None:
        if not self._finished.done():
            self._finished.set_exception(RuntimeError(f"the server {reason}"))


def build_request(url: str, max_tokens: int, *, ignores_end: bool = False, model: str = "nano") -> bytes:
    """One streamed chat request as it goes over the wire."""
    parts = urlsplit(url)
    body = orjson.dumps(
        {
            "model": model,
            "stream": True,
            "max_tokens": max_tokens,
            "ignore_eos": ignores_end,
            "temperature": 0,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "Free OCR. " * 8}],
        }
    )
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def apply(url: str, request: bytes, num_requests: int, concurrency: int) -> LoadResult:
    """Send the requests and wait for their answers.

    Raises:
        RuntimeError: a connection was lost or an answer was not whole.
    """
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    tally = _Tally(num_requests)
    started_s = time.perf_counter()
    finished = [loop.create_future() for _ in range(concurrency)]
    assert parts.hostname is not None
    for future in finished:
        await loop.create_connection(partial(_Client, request, tally, future), parts.hostname, parts.port or 80)
    await asyncio.gather(*finished)
    return LoadResult(time.perf_counter() - started_s, tally.num_chunks, tuple(sorted(tally.first_s)))


def run_load(
    url: str,
    *,
    num_requests: int,
    concurrency: int,
    max_tokens: int,
    ignores_end: bool = False,
    model: str = "nano",
    timeout_s: float = 300,
) -> LoadResult:
    """The same from a process of its own.

    Raises:
        RuntimeError: the load could not be applied whole.
    """
    command = [sys.executable, "-m", "benchmarks.router.load", url, "--model", model]
    command += ["--requests", str(num_requests), "--concurrency", str(concurrency), "--max-tokens", str(max_tokens)]
    if ignores_end:
        command.append("--ignores-end")
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"the load on {url} broke: {done.stderr[-1000:]}")
    result = json.loads(done.stdout)
    return LoadResult(result["took_s"], result["num_chunks"], tuple(result["first_s"]))


def main(
    url: str,
    requests: Annotated[int, typer.Option()] = 1,
    concurrency: Annotated[int, typer.Option()] = 1,
    max_tokens: Annotated[int, typer.Option()] = 64,
    ignores_end: Annotated[bool, typer.Option("--ignores-end")] = False,
    model: Annotated[str, typer.Option()] = "nano",
) -> None:
    """Apply a load and print what came."""
    request = build_request(url, max_tokens, ignores_end=ignores_end, model=model)
    print(json.dumps(dataclasses.asdict(uvloop.run(apply(url, request, requests, concurrency)))))


if __name__ == "__main__":
    typer.run(main)
