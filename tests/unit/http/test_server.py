from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serving.http.server import HttpServer


class App:
    """Answers 200; with `hold`, only once `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.has_begun = asyncio.Event()
        self.go.set()
        self.lifespan: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{step}"
                self.lifespan.append(step)
                await send({"type": f"lifespan.{step}.complete"})
            return
        self.has_begun.set()
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[HttpServer]:
    server = HttpServer(app, **{"host": "127.0.0.1", "port": 0, "drain_s": 1, **options})
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def get(port: int, host: str = "127.0.0.1") -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://{host}:{port}/")


async def test_it_serves_on_a_free_port_until_it_is_stopped() -> None:
    server = HttpServer(App(), host="127.0.0.1", port=0, drain_s=1)
    port = server.port
    assert port > 0
    assert not server.is_serving
    await server.start()
    assert server.is_serving
    response = await get(port)
    assert (response.status_code, response.content) == (200, b"ok")
    assert "server" not in response.headers
    await server.stop()
    assert not server.is_serving
    with pytest.raises(httpx.ConnectError):
        await get(port)


async def test_a_taken_address_is_refused_at_once() -> None:
    async with serve(App()) as server:
        with pytest.raises(OSError, match="in use"):
            HttpServer(App(), host="127.0.0.1", port=server.port, drain_s=1)


async def test_an_address_of_another_machine_is_refused_at_once() -> None:
    with pytest.raises(OSError, match="assign"):
        HttpServer(App(), host="203.0.113.1", port=0, drain_s=1)


async def test_servers_that_say_so_share_a_port() -> None:
    async with serve(App(), shares_port=True) as first:
        async with serve(App(), port=first.port, shares_port=True) as second:
            assert second.port == first.port
            assert (await get(first.port)).status_code == 200
        assert (await get(first.port)).status_code == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="IPv6 is not there (net.ipv6.conf.all.disable_ipv6=0)")
async def test_an_address_with_colons_is_ipv6() -> None:
    async with serve(App(), host="::1") as server:
        assert (await get(server.port, "[::1]")).status_code == 200


async def test_running_requests_are_finished_and_no_new_ones_taken() -> None:
    app = App()
    app.go.clear()
    server = HttpServer(app, host="127.0.0.1", port=0, drain_s=5)
    await server.start()
    port = server.port
    running = asyncio.create_task(get(port))
    await app.has_begun.wait()
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0.25)
    assert not stopping.done()
    with pytest.raises(httpx.ConnectError):
        await get(port)
    app.go.set()
    assert (await running).content == b"ok"
    await asyncio.wait_for(stopping, 2)


async def test_a_request_that_takes_longer_than_the_drain_is_cut() -> None:
    app = App()
    app.go.clear()
    server = HttpServer(app, host="127.0.0.1", port=0, drain_s=0)
    await server.start()
    running = asyncio.create_task(get(server.port))
    await app.has_begun.wait()
    await asyncio.wait_for(server.stop(), 3)
    response = await asyncio.gather(running, return_exceptions=True)
    assert not isinstance(response[0], httpx.Response) or response[0].status_code == 500


async def test_an_idle_connection_does_not_hold_up_the_end() -> None:
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(2), serve(App(), drain_s=60) as server:
        await client.get(f"http://127.0.0.1:{server.port}/")


async def test_small_writes_are_not_held_back() -> None:
    async with httpx.AsyncClient(trust_env=False) as client, serve(App()) as server:
        await client.get(f"http://127.0.0.1:{server.port}/")
        (connection,) = server.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("has_lifespan", [True, False])
async def test_lifespan_events_are_for_apps_that_want_them(has_lifespan: bool) -> None:
    app = App()
    async with serve(app, has_lifespan=has_lifespan):
        assert app.lifespan == ["startup"] * has_lifespan
    assert app.lifespan == ["startup", "shutdown"] * has_lifespan


async def test_signals_are_left_to_the_process() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with serve(App()):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_a_server_that_was_never_started_can_be_stopped() -> None:
    server = HttpServer(App(), host="127.0.0.1", port=0, drain_s=1)
    port = server.port
    await server.stop()
    async with serve(App(), port=port):
        pass


def test_an_app_that_refuses_to_start_is_told_to_the_caller() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no weights"})

    async def start() -> None:
        server = HttpServer(refuse, host="127.0.0.1", port=0, drain_s=1, has_lifespan=True)
        try:
            with pytest.raises(RuntimeError):
                await server.start()
        finally:
            await server.stop()

    asyncio.run(start())
