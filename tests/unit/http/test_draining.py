from __future__ import annotations

import asyncio
import time

import httpx
from starlette.types import Receive, Scope, Send

from serving.http.draining import Drainable
from serving.http.server import HttpServer


class App:
    """Streams an answer in two parts; the second when it may."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        self.has_begun.set()
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"two"})


def client(app: Drainable) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")


async def test_before_the_end_nothing_is_added() -> None:
    app = App()
    app.may_end.set()
    async with client(Drainable(app)) as http:
        answer = await http.get("/ready")
    assert (answer.text, answer.headers.get("connection"), answer.headers["x-a"]) == ("onetwo", None, "b")


async def test_answers_that_had_begun_are_waited_for_and_later_ones_close_their_connection() -> None:
    app = App()
    drainable = Drainable(app)
    async with client(drainable) as http:
        old = asyncio.create_task(http.get("/"))
        await app.has_begun.wait()
        draining = asyncio.create_task(drainable.drain(timeout_s=30))
        await asyncio.sleep(0.01)
        new = asyncio.create_task(http.get("/"))
        ready = await http.get("/ready")
        assert (ready.status_code, ready.headers["connection"]) == (503, "close")
        await asyncio.sleep(0.05)
        assert not draining.done()
        app.may_end.set()
        assert (await old).headers.get("connection") is None
        answer = await new
        assert (answer.text, answer.headers["connection"], answer.headers["x-a"]) == ("onetwo", "close", "b")
        started_s = time.monotonic()
        await draining
        assert 0.5 < time.monotonic() - started_s < 10, "its client's next request is waited for, too"


async def test_the_wait_has_an_end() -> None:
    app = App()
    drainable = Drainable(app)
    async with client(drainable) as http:
        old = asyncio.create_task(http.get("/"))
        await app.has_begun.wait()
        async with asyncio.timeout(10):
            await drainable.drain(timeout_s=0.1)
        app.may_end.set()
        await old


async def test_clients_that_send_one_request_after_another_lose_none() -> None:
    """Over sockets: those that are connected when it drains, until it has stopped."""

    class Quick:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(0.01)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    drainable = Drainable(Quick())
    server = HttpServer(drainable, host="127.0.0.1", port=0, drain_s=5)
    await server.start()
    url = f"http://127.0.0.1:{server.port}/"
    lost: list[httpx.TransportError] = []

    async def ask_on(is_at_work: asyncio.Event) -> None:
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:  # plain HTTP
            while True:
                try:
                    answer = await http.get(url)
                except httpx.TransportError as error:
                    lost.append(error)
                    return
                is_at_work.set()
                if answer.headers.get("connection") == "close":
                    return

    at_work = [asyncio.Event() for _ in range(8)]
    asking = [asyncio.create_task(ask_on(event)) for event in at_work]
    for event in at_work:
        await event.wait()
    await drainable.drain(timeout_s=5)
    await server.stop()
    await asyncio.gather(*asking)
    assert lost == []
