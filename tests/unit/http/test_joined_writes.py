from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from serving.http.joined_writes import JoiningTransport, WriteRound
from serving.http.server import HttpServer


@dataclass
class Inner:
    """Notes what a transport is told."""

    told: list[Any] = field(default_factory=list)
    is_lost: bool = False

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("close")

    def abort(self) -> None:
        self.told.append("abort")

    def write_eof(self) -> None:
        self.told.append("eof")

    def is_closing(self) -> bool:
        return self.is_lost

    def get_write_buffer_size(self) -> int:
        return 1000


def build(round_: WriteRound, inner: Inner) -> JoiningTransport:
    return JoiningTransport(inner, round_)  # type: ignore[arg-type]


async def test_all_that_is_written_in_a_round_goes_out_as_one_at_its_end() -> None:
    round_, inner, other = WriteRound(), Inner(), Inner()
    transport, second = build(round_, inner), build(round_, other)
    transport.write(b"a")
    second.write(b"x")
    transport.write(b"")
    transport.write(b"b")
    assert inner.told == other.told == []
    assert transport.get_write_buffer_size() == 1002
    await asyncio.sleep(0)
    assert (inner.told, other.told) == ([b"ab"], [b"x"])
    transport.write(b"c")
    await asyncio.sleep(0)
    assert inner.told == [b"ab", b"c"]


async def test_tasks_that_are_ready_together_are_written_together() -> None:
    round_, inner = WriteRound(), Inner()
    transport, go = build(round_, inner), asyncio.Event()

    async def write(data: bytes) -> None:
        await go.wait()
        transport.write(data)

    tasks = [asyncio.create_task(write(bytes([65 + i]))) for i in range(4)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*tasks)
    await asyncio.sleep(0)
    assert inner.told == [b"ABCD"]


async def test_what_comes_after_writes_does_not_overtake_them() -> None:
    for end, told in (("close", "close"), ("write_eof", "eof")):
        inner = Inner()
        transport = build(WriteRound(), inner)
        transport.write(b"a")
        getattr(transport, end)()
        await asyncio.sleep(0)
        assert inner.told == [b"a", told]


async def test_an_abort_drops_what_was_put_off() -> None:
    inner = Inner()
    transport = build(WriteRound(), inner)
    transport.write(b"a")
    transport.abort()
    await asyncio.sleep(0)
    assert inner.told == ["abort"]


async def test_nothing_is_written_to_a_connection_that_was_lost_meanwhile() -> None:
    inner = Inner()
    transport = build(WriteRound(), inner)
    transport.write(b"a")
    inner.is_lost = True
    await asyncio.sleep(0)
    assert inner.told == []


async def test_much_is_written_at_once_so_that_the_transports_own_limits_hold() -> None:
    inner = Inner()
    transport = build(WriteRound(), inner)
    transport.write(bytes(64 * 1024))
    assert inner.told == []
    transport.write(b"a")
    assert [len(data) for data in inner.told] == [64 * 1024 + 1]
    await asyncio.sleep(0)
    assert len(inner.told) == 1


def test_nothing_of_a_transport_is_left_to_its_base_class() -> None:
    public = {name for name, _ in inspect.getmembers(asyncio.Transport, callable) if not name.startswith("_")}
    assert public - vars(JoiningTransport).keys() == {"writelines"}  # made of `write` by the base class


async def test_a_stream_comes_as_it_is_made() -> None:
    """A piece does not wait for the next."""
    go = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"last"})

    server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1)
    await server.start()
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        client.stream("GET", f"http://127.0.0.1:{server.port}") as answer,
    ):
        pieces = answer.aiter_raw()
        assert await anext(pieces) == b"first"
        go.set()
        assert await anext(pieces) == b"last"
    await server.stop()
