from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import uvicorn
from hostile.wire import send
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.http.protocol import GuardedProtocol
from serving.http.server import HttpServer
from serving.settings.router import LimitSettings

QUICK = LimitSettings(max_header_bytes=2048, header_timeout_s=0.2, body_timeout_s=0.3, write_timeout_s=0.3)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class App:
    """Answers with what it got; a path chooses something else."""

    heads: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    has_left: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = list(scope["headers"])
        self.heads.append(headers)
        if scope["path"] == "/flood":
            await self._flood(receive, send)
            return
        if scope["path"] != "/early":
            body = b""
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.has_left.set()
                    return
                body += message["body"]
                if not message["more_body"]:
                    break
            self.bodies.append(body)
            self.heads[-1] = list(scope["headers"])
        if scope["path"] == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.has_left.set()
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def _flood(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.create_task(self._wait_for_leave(receive))
        while not self.has_left.is_set():
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            await asyncio.sleep(0)
        await leaving

    async def _wait_for_leave(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.has_left.set()


@contextlib.asynccontextmanager
async def serve(app: Any, limits: LimitSettings | None = QUICK) -> AsyncIterator[HttpServer]:
    server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1, limits=limits)
    await server.start()
    try:
        yield server
        for _ in range(100):
            if not server.connections:
                break
            await asyncio.sleep(0.05)
        assert not server.connections
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def refusal(port: int, raw: bytes) -> tuple[int, str | None]:
    answer = await send(port, raw, timeout_s=3)
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    return answer.status, answer.error()["code"]


# What this file is built on: when one of these fails, read uvicorn's new source before mending it


def test_uvicorn_is_the_one_that_the_protocol_was_written_for() -> None:
    assert uvicorn.__version__.startswith("0.54.")


REPLACED = {
    name for name, value in vars(GuardedProtocol).items() if callable(value) and hasattr(HttpToolsProtocol, name)
}


@pytest.mark.parametrize("name", sorted(REPLACED - {"__init__"}))
def test_a_method_that_is_replaced_still_takes_the_same(name: str) -> None:
    ours, theirs = getattr(GuardedProtocol, name), getattr(HttpToolsProtocol, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_the_methods_that_uvicorn_calls_are_still_there() -> None:
    assert {
        "connection_made",
        "connection_lost",
        "data_received",
        "pause_writing",
        "resume_writing",
        "on_message_begin",
        "on_header",
        "on_headers_complete",
        "on_body",
        "on_message_complete",
        "on_response_complete",
        "timeout_keep_alive_handler",
        "send_400_response",
        "_unsupported_upgrade_warning",
    } <= REPLACED
    cycle = inspect.getsource(RequestResponseCycle)
    for name in ("keep_alive", "response_started", "response_complete", "more_body", "disconnected", "message_event"):
        assert f"self.{name}" in cycle


# What passes


async def test_requests_are_served_one_after_another() -> None:
    app = App()
    async with serve(app) as server, connect(server.port) as (reader, writer):
        for _ in range(3):
            writer.write(GET)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.25)  # longer than headers may take: an idle connection is no slow one
    assert len(app.heads) == 3


async def test_headers_up_to_the_limit_pass_in_any_pieces() -> None:
    app = App()
    raw = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (2048 - 35) + b"\r\n\r\n"
    async with serve(app) as server:
        assert (await send(server.port, raw)).status == 200
        async with connect(server.port) as (reader, writer):
            for at in range(0, len(raw), 100):
                writer.write(raw[at : at + 100])
                await writer.drain()
                await asyncio.sleep(0.001)
            assert await reader.readuntil(b"ok")


async def test_a_large_body_does_not_count_as_headers() -> None:
    app = App()
    body = b"x" * 300_000
    raw = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + body
    async with serve(app) as server:
        assert (await send(server.port, raw)).status == 200
    assert app.bodies == [body]


async def test_trailers_do_not_become_headers() -> None:
    app = App()
    raw = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nAuthorization: me\r\n\r\n"
    async with serve(app) as server:
        assert (await send(server.port, raw)).status == 200
    assert app.bodies == [b"hi"]
    assert [name for name, _ in app.heads[0]] == [b"host", b"transfer-encoding"]


async def test_an_upgrade_is_ignored() -> None:
    async with serve(App()) as server:
        answer = await send(server.port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_old_clients_need_no_host() -> None:
    async with serve(App()) as server:
        assert (await send(server.port, b"GET / HTTP/1.0\r\n\r\n")).status == 200


async def test_without_limits_all_is_as_uvicorn_has_it() -> None:
    app = App()
    async with serve(app, None) as server:
        raw = b"GET / HTTP/1.1\r\nX: " + b"y" * 50_000 + b"\r\n\r\n"
        assert (await send(server.port, raw)).status == 200


# What is refused


@pytest.mark.parametrize("size", [2030, 5000, 1_000_000])
async def test_headers_over_the_limit_are_refused(size: int) -> None:
    app = App()
    async with serve(app) as server:
        for raw in (
            b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * size + b"\r\n\r\n",
            b"GET /" + b"y" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (size // 6 + 1) + b"\r\n",
        ):
            assert await refusal(server.port, raw) == (431, "headers_too_large")
    assert app.heads == []


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 2\r\n\r\nhi",
    ],
)
async def test_what_is_no_plain_http_is_refused(raw: bytes) -> None:
    app = App()
    async with serve(app) as server:
        assert await refusal(server.port, raw) == (400, "invalid_http")
    assert app.heads == []


async def test_a_broken_chunk_is_refused_though_the_app_has_begun() -> None:
    app = App()
    raw = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serve(app) as server, connect(server.port) as (reader, writer):
        writer.write(raw)
        await asyncio.sleep(0.05)
        writer.write(b"zz\r\n")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 400")
        await asyncio.wait_for(app.has_left.wait(), 1)


@pytest.mark.parametrize("filler", [b"1;" + b"x" * 5000 + b"\r\ny\r\n", b"0\r\n" + b"X: y\r\n" * 4000])
async def test_a_body_of_framing_is_refused(filler: bytes) -> None:
    raw = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serve(App()) as server, connect(server.port) as (reader, writer):
        writer.write(raw)
        await asyncio.sleep(0.05)
        writer.write(filler * (1 if filler.startswith(b"0") else 4))
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 400")


async def test_an_error_is_never_written_into_an_answer() -> None:
    app = App()
    async with serve(app) as server, connect(server.port) as (reader, writer):
        writer.write(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\0\0\0 garbage\r\n\r\n")
        seen = await reader.readexactly(300_000)
        assert b"HTTP/1.1" not in seen
    await asyncio.wait_for(app.has_left.wait(), 2)


async def test_a_second_request_before_the_answer_is_left_unanswered() -> None:
    """And the first still learns that its client has left."""
    app = App()
    async with serve(app) as server:
        async with connect(server.port) as (reader, writer):
            writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + GET)
            await asyncio.sleep(0.1)
            assert len(app.heads) == 1
        await asyncio.wait_for(app.has_left.wait(), 1)
        async with connect(server.port) as (reader, writer):
            writer.write(GET + GET)
            answer = await reader.read()
            assert answer.count(b"HTTP/1.1 200") == 1
            assert b"connection: close" in answer


# Who takes too long


async def test_headers_that_come_too_slowly_are_refused() -> None:
    app = App()
    async with serve(app) as server, connect(server.port) as (reader, writer):
        started_s = asyncio.get_running_loop().time()
        sending = asyncio.create_task(drip(writer, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200))
        head = await reader.readuntil(b"\r\n\r\n")
        assert asyncio.get_running_loop().time() - started_s < 1
        assert head.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in head
        assert orjson.loads(await reader.read())["error"]["code"] == "request_timeout"
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert app.heads == []


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async with serve(App()) as server, connect(server.port) as (reader, _):
        assert await asyncio.wait_for(reader.read(), 1) == b""


async def test_the_time_counts_anew_for_a_next_request() -> None:
    async with serve(App()) as server, connect(server.port) as (reader, writer):
        writer.write(GET)
        await reader.readuntil(b"ok")
        await asyncio.sleep(0.25)
        writer.write(b"\r\n")
        assert (await asyncio.wait_for(reader.read(), 1)).startswith(b"HTTP/1.1 408")


async def test_who_goes_on_sending_after_the_answer_is_cut_off() -> None:
    async with serve(App()) as server, connect(server.port) as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        await reader.readuntil(b"ok")
        sending = asyncio.create_task(drip(writer, b"x" * 300))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 1) == b""
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_who_has_sent_all_after_the_answer_may_ask_again() -> None:
    async with serve(App()) as server, connect(server.port) as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        await reader.readuntil(b"ok")
        writer.write(b"hello")
        await asyncio.sleep(0.4)
        writer.write(GET)
        assert await reader.readuntil(b"ok")


@pytest.mark.parametrize("reads", [False, True])
async def test_a_client_that_takes_nothing_is_dropped_and_a_slow_one_is_not(reads: bool) -> None:
    app = App()
    async with serve(app) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        await loop.sock_sendall(client, b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            if reads:
                for _ in range(40):
                    assert await loop.sock_recv(client, 200_000)
                    await asyncio.sleep(0.02)
                assert not app.has_left.is_set()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                await asyncio.wait_for(app.has_left.wait(), 2)
        finally:
            client.close()
        await asyncio.wait_for(app.has_left.wait(), 2)
