"""HAProxy on a port of its own, in front of replicas that answer as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from serving.front.haproxy import Haproxy
from serving.front.slots import Address, SlotState
from serving.router_settings import LimitSettings, RouterSettings
from serving.settings import EngineSettings, ModelSettings, Settings

MODEL = "nano"


def build_settings(
    *, limits: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, **router: Any
) -> Settings:
    router = {"mode": "inline", "limits": LimitSettings(**(limits or {})), **router}
    return Settings(
        models={MODEL: ModelSettings(checkpoint="nano")},
        engine=EngineSettings(**{"drain_s": 5, **(engine or {})}),
        router=RouterSettings(**router),
    )


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else gets, and that whoever shares ports may listen on."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@dataclass
class Asked:
    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


@dataclass
class Exchange:
    """One request that a replica got, and the means to answer it byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    asked: Asked

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def start(self, status: int = 200, framing: str = "transfer-encoding: chunked") -> None:
        await self.write(f"HTTP/1.1 {status} X\r\ncontent-type: text/event-stream\r\n{framing}\r\n\r\n".encode())

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.write(b"0\r\n\r\n")

    async def wait_until_left(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(1):
                pass


Script = Callable[[Exchange], Awaitable[None]]


def answers(body: bytes, status: int = 200) -> Script:
    async def script(exchange: Exchange) -> None:
        await exchange.start(status, f"content-length: {len(body)}")
        await exchange.write(body)

    return script


async def hang_up(exchange: Exchange) -> None:
    exchange.writer.close()


@dataclass
class Replica:
    """Listens while its context lasts; healthy unless told otherwise."""

    script: Script = field(default_factory=lambda: answers(b"{}"))
    is_healthy: bool = True
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    _server: asyncio.Server | None = None
    _running: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    @property
    def address(self) -> Address:
        return "127.0.0.1", self.port

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """As a killed process does: every connection is reset, new ones are refused."""
        assert self._server is not None
        self._server.close()
        for task, writer in self._running.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = writer
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while not writer.is_closing():
                    await self._answer(Exchange(reader, writer, await _read(reader)))
        finally:
            del self._running[task]
            writer.close()

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.asked.line.startswith("GET /health "):
            await answers(b"", 200 if self.is_healthy else 500)(exchange)
            return
        self.asked.append(exchange.asked)
        await self.script(exchange)
        if exchange.asked.values("connection") == ["close"]:
            exchange.writer.close()


async def _read(reader: asyncio.StreamReader) -> Asked:
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    headers = [(name.lower(), value) for name, value in (line.split(": ", 1) for line in lines)]
    asked = Asked(line, headers, b"")
    if asked.values("transfer-encoding"):
        while size := int(await reader.readuntil(b"\r\n"), 16):
            asked.body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    else:
        asked.body = await reader.readexactly(int((asked.values("content-length") or ["0"])[0]))
    return asked


@dataclass
class Front:
    haproxy: Haproxy
    client: httpx.AsyncClient
    port: int

    async def steer(self, *replicas: Replica, draining: tuple[Replica, ...] = ()) -> None:
        """These and no others."""
        wanted = {replica.address: SlotState.READY for replica in replicas}
        await self.haproxy.steer(wanted | {replica.address: SlotState.DRAIN for replica in draining})

    async def post(self, content: bytes = b"{}", **options: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", content=content, **options)

    async def send(self, data: bytes, timeout_s: float = 5.0) -> bytes:
        """What comes back for raw bytes until the connection is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        try:
            async with asyncio.timeout(timeout_s):
                return await reader.read()
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def front(settings: Settings | None = None) -> AsyncIterator[Front]:
    settings = settings or build_settings()
    with reserved_port() as port:
        settings = settings.model_copy(update={"router": settings.router.model_copy(update={"port": port})})
        haproxy = Haproxy(settings)
        try:
            await haproxy.wait_until_listening()
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
                yield Front(haproxy, client, port)
        finally:
            await haproxy.stop(is_at_once=True)


async def until(is_so: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Wait for it; returns how long it took."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return time.monotonic() - started


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object, and nothing else in the body."""
    assert response.headers["content-type"] == "application/json"
    body = json.loads(response.content)
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error
