from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from support.router_stack import (
    Engine,
    Exchange,
    Script,
    answers,
    dead_replica,
    deaf_replica,
    dies_after,
    eventually,
    streams,
)

from serving.errors import (
    InternalError,
    ReplicaConnectError,
    ReplicaTimeoutError,
    ReplicaUnreachableError,
    ServingError,
)
from serving.router.relay.http_client import HIGH_WATER_BYTES, Upstream

PATH = "/v1/completions"


@contextlib.asynccontextmanager
async def open_upstream(*, connect_timeout_s: float = 2, read_timeout_s: float = 2) -> AsyncIterator[Upstream]:
    upstream = Upstream(connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s)
    try:
        yield upstream
    finally:
        await upstream.close()


def url_of(engine: Engine, path: str = PATH) -> str:
    return engine.record.base_url + path


async def post(upstream: Upstream, engine: Engine, body: bytes = b"{}") -> tuple[int, bytes]:
    async with upstream.request("POST", url_of(engine), {"x-request-id": "r1"}, body) as answer:
        return answer.status, await answer.read()


async def pieces(upstream: Upstream, engine: Engine) -> list[bytes]:
    async with upstream.request("POST", url_of(engine), {}, b"") as answer:
        return [piece async for piece in _pieces(answer.read_some)]


async def _pieces(read_some: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    while piece := await read_some():
        yield piece


def counts_connections(engine: Engine) -> set[int]:
    """Fills with the ports that requests came from."""
    ports: set[int] = set()
    script = engine.script

    async def count(exchange: Exchange) -> None:
        ports.add(exchange.writer.get_extra_info("peername")[1])
        await script(exchange)

    engine.script = count
    return ports


async def test_a_request_is_sent_as_it_is() -> None:
    async with Engine(answers(b'{"a":1}')) as engine, open_upstream() as upstream:
        assert await post(upstream, engine, b'{"b":2}') == (200, b'{"a":1}')
        host = engine.record.base_url.removeprefix("http://")
    (asked,) = engine.asked
    assert (asked.method, asked.path, asked.body) == ("POST", PATH, b'{"b":2}')
    assert asked.headers == {
        "host": host,
        "x-request-id": "r1",
        "content-length": "7",
    }


async def test_a_large_body_arrives_whole() -> None:
    body = b"x" * 5_000_000
    async with Engine(answers(b"ok")) as engine, open_upstream() as upstream:
        assert await post(upstream, engine, body) == (200, b"ok")
    assert engine.asked[0].body == body


async def test_a_get_has_no_body() -> None:
    async with (
        Engine(answers(b"ok", status=404)) as engine,
        open_upstream() as upstream,
        upstream.request("GET", url_of(engine, "/health?a=b"), {}) as answer,
    ):
        assert (answer.status, await answer.read()) == (404, b"ok")
    assert engine.asked[0].path == "/health?a=b"
    assert "content-length" not in engine.asked[0].headers


async def test_pieces_come_as_they_are_sent() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for piece in (b"one", b"two"):
            await exchange.chunk(piece)
            await asyncio.sleep(0.05)
        await exchange.end()

    async with Engine(script) as engine, open_upstream() as upstream:
        assert await pieces(upstream, engine) == [b"one", b"two"]


@pytest.mark.parametrize("cut", range(1, 12))
async def test_a_chunk_in_two_packets_is_one(cut: int) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        wire = b"6\r\nabcdef\r\n0\r\n\r\n"
        await exchange.write(wire[:cut])
        await asyncio.sleep(0.01)
        await exchange.write(wire[cut:])

    async with Engine(script) as engine, open_upstream() as upstream:
        assert b"".join(await pieces(upstream, engine)) == b"abcdef"


async def test_headers_in_pieces_and_an_interim_answer_are_read() -> None:
    async def script(exchange: Exchange) -> None:
        for part in (b"HTTP/1.1 100 Continue\r\n", b"\r\nHTTP/1.1 2", b"01 X\r\nContent-Le", b"ngth: 2\r\n\r\no", b"k"):
            await exchange.write(part)
            await asyncio.sleep(0.005)

    async with Engine(script) as engine, open_upstream() as upstream:
        assert await post(upstream, engine) == (201, b"ok")


async def test_a_body_may_end_with_its_connection() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.write(b"HTTP/1.1 200 X\r\n\r\nall of it")
        await exchange.die()

    async with Engine(script) as engine, open_upstream() as upstream:
        assert await post(upstream, engine) == (200, b"all of it")


async def test_an_answer_is_read_no_further_than_it_is_wanted() -> None:
    async with (
        Engine(answers(b"x" * 100_000)) as engine,
        open_upstream() as upstream,
        upstream.request("POST", url_of(engine), {}) as answer,
    ):
        assert await answer.read(max_bytes=10) == b"x" * 10


async def test_connections_are_kept() -> None:
    async with Engine(answers(b"ok")) as engine, open_upstream() as upstream:
        ports = counts_connections(engine)
        for _ in range(3):
            await post(upstream, engine)
    assert len(ports) == 1


async def test_a_request_that_finds_none_free_gets_its_own() -> None:
    async with Engine(answers(b"ok")) as engine, open_upstream() as upstream:
        ports = counts_connections(engine)
        await asyncio.gather(*(post(upstream, engine) for _ in range(3)))
        await asyncio.gather(*(post(upstream, engine) for _ in range(3)))
    assert len(ports) == 3


async def test_an_idle_connection_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.router.relay.http_client._KEEP_S", 0.02)
    async with Engine(answers(b"ok")) as engine, open_upstream() as upstream:
        ports = counts_connections(engine)
        await asyncio.gather(*(post(upstream, engine) for _ in range(2)))
        await asyncio.sleep(0.03)
        await post(upstream, engine)
    assert len(ports) == 3


async def test_a_connection_that_the_replica_has_closed_is_not_used_again() -> None:
    async def closes(exchange: Exchange) -> None:
        await exchange.start(length=2)
        await exchange.write(b"ok")
        exchange.writer.close()

    async with Engine(closes) as engine, open_upstream() as upstream:
        for _ in range(2):
            assert await post(upstream, engine) == (200, b"ok")
            await asyncio.sleep(0.02)


async def test_connection_close_is_obeyed() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.write(b"HTTP/1.1 200 X\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")

    async with Engine(script) as engine, open_upstream() as upstream:
        ports = counts_connections(engine)
        await post(upstream, engine)
        await post(upstream, engine)
    assert len(ports) == 2


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.write(b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 500 X\r\n\r\n")

    async with Engine(script) as engine, open_upstream() as upstream:
        ports = counts_connections(engine)
        for _ in range(2):
            assert await post(upstream, engine) == (200, b"ok")
    assert len(ports) == 2


async def test_leaving_early_closes_the_connection() -> None:
    left = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b"one")
        await exchange.wait_until_left()
        left.set()

    async with Engine(script) as engine, open_upstream() as upstream:
        async with upstream.request("POST", url_of(engine), {}) as answer:
            assert await answer.read_some() == b"one"
        async with asyncio.timeout(1):
            await left.wait()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_cancelling_closes_the_connection(has_begun: bool) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def script(exchange: Exchange) -> None:
        if has_begun:
            await exchange.start()
            await exchange.chunk(b"one")
        came.set()
        with contextlib.suppress(ConnectionError):
            await exchange.wait_until_left()
        left.set()

    async with Engine(script) as engine, open_upstream() as upstream:
        asking = asyncio.create_task(post(upstream, engine))
        await came.wait()
        await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(1):
            await left.wait()


async def hang_up(exchange: Exchange) -> None:
    await exchange.die()


async def silence(exchange: Exchange) -> None:
    await exchange.wait_until_left()


async def nonsense(exchange: Exchange) -> None:
    await exchange.write(b"* OK IMAP4rev1 ready\r\n\r\n")
    await silence(exchange)


async def half_a_body(exchange: Exchange) -> None:
    await exchange.start(length=100)
    await exchange.write(b"half")
    await exchange.die()


async def half_a_body_then_silence(exchange: Exchange) -> None:
    await exchange.start(length=100)
    await exchange.write(b"half")
    await silence(exchange)


async def switches_protocols(exchange: Exchange) -> None:
    await exchange.write(b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    await silence(exchange)


async def bad_chunk(exchange: Exchange) -> None:
    await exchange.start()
    await exchange.write(b"zz\r\n")
    await silence(exchange)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (hang_up, ReplicaUnreachableError),
        (silence, ReplicaTimeoutError),
        (nonsense, ReplicaUnreachableError),
        (half_a_body, ReplicaUnreachableError),
        (half_a_body_then_silence, ReplicaTimeoutError),
        (dies_after(b"one"), ReplicaUnreachableError),
        (switches_protocols, ReplicaUnreachableError),
        (bad_chunk, ReplicaUnreachableError),
    ],
)
async def test_what_goes_wrong_is_told_and_the_next_request_finds_a_good_connection(
    script: Script, error: type[ServingError]
) -> None:
    async with Engine(script) as engine, open_upstream(read_timeout_s=0.1) as upstream:
        with pytest.raises(error):
            await post(upstream, engine)
        engine.script = answers(b"ok")
        assert await post(upstream, engine) == (200, b"ok")


async def test_what_came_before_a_loss_is_read_first() -> None:
    async with (
        Engine(dies_after(b"one", b"two")) as engine,
        open_upstream() as upstream,
        upstream.request("POST", url_of(engine), {}) as answer,
    ):
        await asyncio.sleep(0.1)
        assert await answer.read_some() == b"onetwo"
        with pytest.raises(ReplicaUnreachableError):
            await answer.read_some()


async def test_silence_is_counted_from_the_last_byte() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for _ in range(6):
            await exchange.chunk(b"x")
            await asyncio.sleep(0.04)
        await exchange.end()

    async with Engine(script) as engine, open_upstream(read_timeout_s=0.1) as upstream:
        assert b"".join(await pieces(upstream, engine)) == b"xxxxxx"


async def test_a_timeout_may_be_given_for_one_request() -> None:
    async with Engine(silence) as engine, open_upstream() as upstream:
        with pytest.raises(ReplicaTimeoutError):
            async with upstream.request("GET", url_of(engine), {}, read_timeout_s=0.05):
                pass


async def test_nobody_there_and_nobody_who_answers() -> None:
    async with open_upstream(connect_timeout_s=0.1) as upstream:
        for context in (dead_replica(), deaf_replica()):
            with context as replica, pytest.raises(ReplicaConnectError):
                async with upstream.request("POST", replica.base_url + PATH, {}):
                    pass


async def test_an_answer_that_nobody_takes_holds_the_engine_back() -> None:
    num_sent = 0

    async def script(exchange: Exchange) -> None:
        nonlocal num_sent
        await exchange.start()
        for _ in range(400):
            await exchange.chunk(b"x" * 100_000)
            num_sent += 1
        await exchange.end()

    async with (
        Engine(script) as engine,
        open_upstream(read_timeout_s=0.2) as upstream,
        upstream.request("POST", url_of(engine), {}) as answer,
    ):
        await asyncio.sleep(0.3)  # longer than the timeout: it is not the engine that is silent
        assert num_sent < 400
        first = await answer.read_some()
        assert len(first) < 4 * HIGH_WATER_BYTES
        rest = await answer.read()
    assert len(first) + len(rest) == 400 * 100_000


@pytest.mark.parametrize("headers", [{"x": "a\r\nb: c"}, {"x\n": "a"}])
async def test_a_header_cannot_break_the_request(headers: dict[str, str]) -> None:
    async with open_upstream() as upstream:
        with pytest.raises(InternalError):
            async with upstream.request("POST", "http://127.0.0.1:1/", headers):
                pass


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/", "http:///x"])
async def test_only_plain_http_is_spoken(url: str) -> None:
    async with open_upstream() as upstream:
        with pytest.raises(InternalError):
            async with upstream.request("POST", url, {}):
                pass


async def test_closing_ends_what_is_under_way() -> None:
    async with Engine(streams()) as engine, open_upstream() as upstream:
        engine.script = silence
        asking = asyncio.create_task(post(upstream, engine))
        assert await eventually(lambda: len(engine.asked) == 1)
        await upstream.close()
        with pytest.raises(ReplicaUnreachableError):
            await asking
