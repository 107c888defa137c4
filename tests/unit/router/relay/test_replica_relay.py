from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import orjson
import pytest
from starlette.types import Message
from support.router_stack import (
    COST,
    USAGE,
    Engine,
    Exchange,
    Script,
    answers,
    dead_replica,
    deaf_replica,
    dies_after,
    hang_up,
    streams,
)

from serving.billing.prices import Price
from serving.cluster.directory import ReplicaRecord
from serving.errors import (
    InternalError,
    InvalidImageError,
    NoReplicaError,
    ReplicaTimeoutError,
    ReplicaUnreachableError,
    ServingError,
)
from serving.http.reply import Reply
from serving.router.accounting.answer_usage import UsageNotes
from serving.router.relay.replica_relay import Relay
from serving.router.request.parsing import RoutedRequest
from serving.settings.router import RouterSettings

PRICE = Price(input_picodollars=30_000, output_picodollars=100_000)
REQUEST = RoutedRequest("/v1/chat/completions", "nano", b'{"as": "it came"}', is_stream=False, wants_stream_usage=False)
STREAM = dataclasses.replace(REQUEST, is_stream=True)
COUNTING = dataclasses.replace(STREAM, wants_stream_usage=True)
ANSWER = orjson.dumps({"choices": [], "usage": USAGE})
TEXT, USAGE_FRAME, DONE = b"data: {}\n\n", b"data: " + ANSWER + b"\n\n", b"data: [DONE]\n\n"


class Client:
    """Collects what an app sends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def is_complete(self) -> bool:
        return [message.get("more_body") for message in self.messages[1:]][-1:] == [False]


async def relay_to(
    replica: ReplicaRecord, request: RoutedRequest, *, api_key: str | None = None, **router: Any
) -> Client:
    client = Client()
    relay = Relay(RouterSettings(**router), api_key)
    await relay.start()
    reply = Reply(client.send)
    try:
        last = await relay.relay(request, "r-1", replica, UsageNotes(PRICE), reply)
        await (reply.end(last) if request.is_stream else reply.send_body(200, last))
    except ServingError:
        assert reply.has_begun is bool(client.messages)
        assert not reply.is_complete, "whoever gets the error must be able to tell the client of it"
        if client.messages and client.body:
            assert client.body.endswith(b"\n\n"), "what comes next must be a frame of its own"
        raise
    finally:
        await relay.close()
    return client


async def test_a_body_is_sent_with_its_length() -> None:
    client = Client()
    await Reply(client.send).send_body(201, b'{"a":1}')
    assert client.status == 201
    assert client.headers == {b"content-type": b"application/json", b"content-length": b"7"}
    assert client.body == b'{"a":1}'
    assert client.is_complete


async def test_an_error_is_sent_in_openai_shape_with_its_status() -> None:
    client = Client()
    error = InvalidImageError("no image", param="messages[0]")
    await Reply(client.send).send_error(error)
    assert client.status == 400
    assert orjson.loads(client.body) == error.body()


@pytest.mark.parametrize(
    ("request_", "script"),
    [
        (REQUEST, answers(ANSWER)),
        (STREAM, streams(TEXT, USAGE_FRAME, DONE)),
        (COUNTING, streams(TEXT, USAGE_FRAME, DONE)),
    ],
)
async def test_the_end_of_an_answer_is_kept_back_until_the_request_is_accounted_for(
    request_: RoutedRequest, script: Script
) -> None:
    client = Client()
    notes = UsageNotes(PRICE)
    relay = Relay(RouterSettings(), None)
    await relay.start()
    reply = Reply(client.send)
    async with Engine(script) as engine:
        last = await relay.relay(request_, "r-1", engine.record, notes, reply)
    await relay.close()
    assert (client.body if client.messages else b"") == (TEXT if request_.is_stream else b"")
    assert not client.is_complete
    assert notes.tokens is not None, "what it used is known by then"
    assert last.endswith(DONE) if request_.is_stream else b"estimated_cost" in last


@pytest.mark.parametrize("script", [streams(TEXT), streams(TEXT, USAGE_FRAME), dies_after(TEXT)])
async def test_what_breaks_has_no_end(script: Script) -> None:
    client = Client()
    relay = Relay(RouterSettings(), None)
    await relay.start()
    reply = Reply(client.send)
    async with Engine(script) as engine:
        with pytest.raises(ReplicaUnreachableError) as caught:
            await relay.relay(COUNTING, "r-1", engine.record, UsageNotes(PRICE), reply)
        await reply.end_with_error(caught.value)
    await relay.close()
    assert b"estimated_cost" not in client.body, "a broken answer costs nothing"
    assert client.is_complete


async def test_the_engine_gets_the_body_as_it_came_and_the_stacks_own_key() -> None:
    async with Engine(answers(ANSWER)) as engine:
        await relay_to(engine.record, REQUEST, api_key="sesame")
    (asked,) = engine.asked
    assert (asked.method, asked.path, asked.body) == ("POST", REQUEST.path, REQUEST.body)
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["authorization"] == "Bearer sesame"


async def test_without_a_key_none_is_brought() -> None:
    async with Engine(answers(ANSWER)) as engine:
        await relay_to(engine.record, REQUEST)
    assert "authorization" not in engine.asked[0].headers


async def test_the_engine_is_not_asked_to_compress() -> None:
    async with Engine(answers(ANSWER)) as engine:
        await relay_to(engine.record, REQUEST)
    assert engine.asked[0].headers.get("accept-encoding", "identity") == "identity"


async def test_a_whole_answer_comes_with_its_cost() -> None:
    async with Engine(answers(ANSWER)) as engine:
        client = await relay_to(engine.record, REQUEST)
    assert client.status == 200
    assert client.headers[b"content-type"] == b"application/json"
    assert client.headers[b"content-length"] == b"%d" % len(client.body)
    assert orjson.loads(client.body) == {"choices": [], "usage": {**USAGE, "estimated_cost": COST}}


async def test_a_stream_is_told_to_be_one() -> None:
    async with Engine(streams(b"data: {}\n\n", b"data: [DONE]\n\n")) as engine:
        client = await relay_to(engine.record, STREAM)
    assert client.headers == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    assert client.is_complete


async def test_an_unfinished_frame_at_the_end_is_passed() -> None:
    async with Engine(streams(b"data: {}\n\n", b"data: [DONE]")) as engine:
        client = await relay_to(engine.record, dataclasses.replace(STREAM, wants_stream_usage=True))
    assert client.body == b"data: {}\n\ndata: [DONE]"


async def test_a_relay_that_was_not_started_says_so() -> None:
    with dead_replica() as replica, pytest.raises(InternalError):
        await Relay(RouterSettings(), None).relay(REQUEST, "r-1", replica, UsageNotes(PRICE), Reply(Client().send))


async def silence(exchange: Exchange) -> None:
    await exchange.wait_until_left()


async def half_an_answer(exchange: Exchange) -> None:
    await exchange.start(length=100)
    await exchange.write(b'{"choices":')
    await exchange.die()


async def half_an_answer_then_silence(exchange: Exchange) -> None:
    await exchange.start(length=100)
    await exchange.write(b'{"choices":')
    await exchange.wait_until_left()


async def nonsense(exchange: Exchange) -> None:
    await exchange.write(b"* OK IMAP4rev1 ready\r\n\r\n")
    await exchange.die()


@pytest.mark.parametrize(
    ("script", "request_", "error"),
    [
        (answers(b'{"error":{"message":"busy"}}', status=503), REQUEST, NoReplicaError),
        (answers(b'{"error":{"message":"busy"}}', status=503), STREAM, NoReplicaError),
        (answers(b"boom", status=500), REQUEST, InternalError),
        (answers(b"boom", status=500), STREAM, InternalError),
        (silence, REQUEST, ReplicaTimeoutError),
        (silence, STREAM, ReplicaTimeoutError),
        (nonsense, REQUEST, ReplicaUnreachableError),
        (nonsense, STREAM, ReplicaUnreachableError),
        (half_an_answer, REQUEST, ReplicaUnreachableError),
        (half_an_answer_then_silence, REQUEST, ReplicaTimeoutError),
    ],
)
async def test_what_goes_wrong_before_the_answer_is_raised(
    script: Script, request_: RoutedRequest, error: type[ServingError]
) -> None:
    async with Engine(script) as engine:
        with pytest.raises(error):
            await relay_to(engine.record, request_, read_timeout_s=0.2)


async def test_a_refused_connection_is_raised() -> None:
    with dead_replica() as replica, pytest.raises(ReplicaUnreachableError):
        await relay_to(replica, REQUEST)


async def test_a_machine_that_does_not_answer_is_given_up_after_the_connect_timeout() -> None:
    with deaf_replica() as replica, pytest.raises(ReplicaUnreachableError):
        async with asyncio.timeout(2):
            await relay_to(replica, REQUEST, connect_timeout_s=0.2, read_timeout_s=60)


async def test_a_long_error_answer_is_read_whole() -> None:
    body = orjson.dumps({"error": {"message": "x" * 50_000, "param": "seed"}})
    async with Engine(answers(body, status=400)) as engine:
        with pytest.raises(ServingError) as caught:
            await relay_to(engine.record, REQUEST)
    assert caught.value.message == "seed has a value that the model cannot use."


async def test_an_error_answer_in_two_pieces_is_read_whole() -> None:
    body = orjson.dumps({"error": {"message": "the maximum context length is 77 tokens"}})

    async def in_two_pieces(exchange: Exchange) -> None:
        await exchange.start(400, "application/json", len(body))
        await exchange.write(body[:10])
        await asyncio.sleep(0.05)
        await exchange.write(body[10:])

    async with Engine(in_two_pieces) as engine:
        with pytest.raises(ServingError, match="context of 77 tokens"):
            await relay_to(engine.record, REQUEST)


@pytest.mark.parametrize("frames", [(b'data: {"a":1}\n\n',), (b'data: {"a":1}\n\ndata: {"b',)], ids=["whole", "cut"])
@pytest.mark.parametrize("wants_stream_usage", [True, False])
@pytest.mark.parametrize("script", [dies_after, streams], ids=["dies", "ends without saying so"])
async def test_a_stream_that_is_cut_is_raised(script: Any, wants_stream_usage: bool, frames: tuple[bytes, ...]) -> None:
    async with Engine(script(*frames)) as engine:
        with pytest.raises(ReplicaUnreachableError):
            await relay_to(engine.record, dataclasses.replace(STREAM, wants_stream_usage=wants_stream_usage))


async def test_a_stream_that_is_cut_before_its_first_byte_may_be_tried_elsewhere() -> None:
    async with Engine(dies_after()) as engine:
        with pytest.raises(ReplicaUnreachableError):
            await relay_to(engine.record, STREAM)


async def test_a_stream_that_falls_silent_ends_with_an_error_event() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b"data: {}\n\n")
        await exchange.wait_until_left()

    async with Engine(script) as engine:
        with pytest.raises(ReplicaTimeoutError):
            await relay_to(engine.record, STREAM, read_timeout_s=0.2)


async def test_the_engine_learns_the_requests_id() -> None:
    async with Engine(answers(ANSWER)) as engine:
        await relay_to(engine.record, REQUEST)
    assert engine.asked[0].headers["x-request-id"] == "r-1"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (answers(b'{"completion_tokens":3}'), {"completion_tokens": 3}),
        (answers(b'{"error":{}}', status=404), None),
        (answers(b"no JSON"), None),
        (answers(b"[]"), None),
        (hang_up, None),
    ],
)
async def test_an_engine_is_asked_for_what_it_counted(script: Script, found: Any) -> None:
    relay = Relay(RouterSettings(), "sesame")
    await relay.start()
    async with Engine(script, answers_usage=True) as engine:
        assert await relay.fetch_usage(engine.record, "r-1") == found
    assert (engine.asked[0].method, engine.asked[0].path) == ("GET", "/usage/r-1")
    assert engine.asked[0].headers["authorization"] == "Bearer sesame"
    await relay.close()


async def test_an_engine_that_is_gone_cannot_tell() -> None:
    relay = Relay(RouterSettings(), None)
    await relay.start()
    with dead_replica() as replica:
        assert await relay.fetch_usage(replica, "r-1") is None
    await relay.close()
