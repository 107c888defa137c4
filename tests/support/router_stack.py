"""A router on a socket of its own, in front of engines that answer as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import orjson

from serving.billing.open_requests import OpenRequest
from serving.billing.records import RequestRecord
from serving.cluster.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.http.server import HttpServer
from serving.router.app import RouterApp
from serving.settings.router import AdmissionSettings, LimitSettings, RouterSettings
from serving.settings.stack import EngineSettings, ModelSettings, Settings

MODEL = "nano"
ALIAS = "deepseek-ai/DeepSeek-OCR"
MAX_BODY_BYTES = 300_000
USAGE = {"prompt_tokens": 1000, "total_tokens": 1500, "completion_tokens": 500}
COST = 0.00008
HEAD = b"host: localhost\r\ncontent-type: application/json\r\n"
"""Headers that every request with a body needs while no key does."""


def build_settings(*, api_key: str | None = None, **router: Any) -> Settings:
    defaults = {
        "limits": LimitSettings(max_body_bytes=MAX_BODY_BYTES),
        "admission": AdmissionSettings(replica_wait_s=0),
        "read_timeout_s": 5.0,
        "stream_usage": "asked",
    }
    return Settings(
        models={MODEL: ModelSettings(checkpoint="nano", aliases=(ALIAS,))},
        engine=EngineSettings(api_key=api_key),
        router=RouterSettings(**{**defaults, **router}),
    )


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Exchange:
    """One request that an engine got, and the means to answer it byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    asked: Asked

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def start(
        self, status: int = 200, content_type: str = "text/event-stream", length: int | None = None
    ) -> None:
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        await self.write(f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n".encode())

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.write(b"0\r\n\r\n")

    async def die(self) -> None:
        # What was written goes out first, as from a process that is killed.
        await asyncio.sleep(0.02)
        self.writer.close()

    async def wait_until_left(self) -> None:
        assert await self.reader.read(1) == b""


Script = Callable[[Exchange], Awaitable[None]]


def answers(body: bytes, status: int = 200, content_type: str = "application/json") -> Script:
    async def script(exchange: Exchange) -> None:
        await exchange.start(status, content_type, len(body))
        await exchange.write(body)

    return script


def streams(*chunks: bytes) -> Script:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for chunk in chunks:
            await exchange.chunk(chunk)
        await exchange.end()

    return script


def dies_after(*chunks: bytes) -> Script:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for chunk in chunks:
            await exchange.chunk(chunk)
        await exchange.die()

    return script


def streams_and_waits(left: asyncio.Event, *chunks: bytes) -> Script:
    """Nothing at all without chunks; `left` is set when the router has closed the connection."""

    async def script(exchange: Exchange) -> None:
        if chunks:
            await exchange.start()
        for chunk in chunks:
            await exchange.chunk(chunk)
        await exchange.wait_until_left()
        left.set()

    return script


async def hang_up(exchange: Exchange) -> None:
    await exchange.die()


@dataclass
class Engine:
    """Listens while its context lasts."""

    script: Script
    replica_id: str = "engine"
    max_num_seqs: int = 4
    answers_usage: bool = False
    """Whether its script answers for `GET /usage/...` too; otherwise it knows nothing of any request."""
    asked: list[Asked] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    @property
    def record(self) -> ReplicaRecord:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return build_record(self.replica_id, port, self.max_num_seqs)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while not writer.is_closing():
                    asked = await read_request(reader)
                    if asked.path.startswith("/usage/") and not self.answers_usage:
                        await answers(b"{}", status=404)(Exchange(reader, writer, asked))
                        continue
                    self.asked.append(asked)
                    await self.script(Exchange(reader, writer, asked))
        finally:
            self._running.discard(task)
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
    return Asked(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


def build_record(replica_id: str, port: int, max_num_seqs: int = 4) -> ReplicaRecord:
    url = f"http://127.0.0.1:{port}"
    return ReplicaRecord(replica_id, MODEL, url, ReplicaState.READY, max_num_seqs=max_num_seqs, max_model_len=2048)


@contextlib.contextmanager
def dead_replica(replica_id: str = "dead") -> Iterator[ReplicaRecord]:
    """The address of nobody: connections are refused, and nobody else gets the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield build_record(replica_id, taken.getsockname()[1])


@contextlib.contextmanager
def deaf_replica(replica_id: str = "deaf") -> Iterator[ReplicaRecord]:
    """An address that takes no more connections and says nothing, like a machine that was switched off."""
    with socket.socket() as listener, contextlib.ExitStack() as queue:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield build_record(replica_id, listener.getsockname()[1])


@dataclass
class MemoryJournal:
    """Keeps rows in memory, for tests that look at them."""

    records: list[RequestRecord] = field(default_factory=list)
    opened: list[OpenRequest] = field(default_factory=list)

    def open(self, request: OpenRequest) -> None:
        self.opened.append(request)

    def record(self, record: RequestRecord) -> None:
        self.records.append(record)


@dataclass
class ReplicaList:
    """What the directory says: a test may change it, and then calls `refresh` of the router's app."""

    records: list[ReplicaRecord]
    is_stopping: bool = False

    def snapshot(self) -> Snapshot:
        return Snapshot((1, 1), tuple(self.records), is_stopping=self.is_stopping)


@dataclass
class RunningRouter:
    app: RouterApp
    client: httpx.AsyncClient
    port: int
    replicas: ReplicaList

    @property
    def records(self) -> list[ReplicaRecord]:
        return self.replicas.records

    @property
    def num_queued(self) -> int:
        return sum(self.app.dispatcher.queue_lengths().values())

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", content=chat_body(**fields))

    @contextlib.asynccontextmanager
    async def fronting(self, *records: ReplicaRecord) -> AsyncIterator[None]:
        """Uses these replicas for a while. In the end nothing may be counted as under way."""
        self.records[:] = records
        self.app.refresh()
        try:
            yield
            assert await self.is_idle()
        finally:
            self.records.clear()
            self.app.refresh()

    async def is_idle(self) -> bool:
        """Whether nothing is counted as under way, a moment after the answer at the latest."""
        return await eventually(lambda: self.app.is_idle)


@contextlib.asynccontextmanager
async def run_router(
    *records: ReplicaRecord,
    settings: Settings | None = None,
    has_ledger: bool = False,
    journal: MemoryJournal | None = None,
) -> AsyncIterator[RunningRouter]:
    replicas = ReplicaList(list(records))
    app = RouterApp(
        settings or build_settings(),
        read_snapshot=replicas.snapshot,
        has_ledger=has_ledger,
        journal=journal,
    )
    server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1, limits=app.settings.router.limits)
    await app.start()
    await server.start()
    try:
        async with connect(server.port) as client:
            router = RunningRouter(app, client, server.port, replicas)
            yield router
            assert await router.is_idle()
    finally:
        await server.stop()
        await app.close()


def connect(port: int, timeout_s: float = 10.0) -> httpx.AsyncClient:
    """A client that says what its bodies are, unless a test says so itself."""
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        timeout=timeout_s,
        trust_env=False,
        event_hooks={"request": [_name_json]},
    )


async def _name_json(request: httpx.Request) -> None:
    request.headers.setdefault("content-type", "application/json")


def chat_body(**fields: Any) -> bytes:
    return orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields})


async def eventually(is_so: Callable[[], bool], timeout_s: float = 1.0) -> bool:
    for _ in range(round(timeout_s / 0.01)):
        if is_so():
            return True
        await asyncio.sleep(0.01)
    return is_so()
