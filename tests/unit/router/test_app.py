from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio
from starlette.types import Message
from support.request_pictures import encode_image, image_part, png_header, to_url
from support.router_stack import (
    ALIAS,
    COST,
    HEAD,
    MAX_BODY_BYTES,
    MODEL,
    USAGE,
    Engine,
    Exchange,
    RunningRouter,
    answers,
    build_record,
    build_settings,
    chat_body,
    dead_replica,
    deaf_replica,
    dies_after,
    eventually,
    hang_up,
    run_router,
    streams,
    streams_and_waits,
)

from serving.cluster.directory import ReplicaState
from serving.errors import BodyTooLargeError
from serving.http.bodies import ClientGoneError, read_body
from serving.router.app import RouterApp
from serving.settings.router import LimitSettings

# One router for all tests of the module: starting and stopping one takes longer than most tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")

CHOICES = [{"message": {"content": "Grüße 文"}}]
ANSWER: dict[str, Any] = {"id": "c-1", "model": MODEL, "choices": CHOICES, "usage": USAGE}
PRICED = {**ANSWER, "usage": {**USAGE, "estimated_cost": COST}}
FRAMES = [
    b'data: {"id": "c-1",  "choices":[{"delta":{"content":"Gr\xc3\xbc"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\"usage\\":{"}}],"usage":null}\n\n',
    b'data: {"choices":[],"usage":' + orjson.dumps(USAGE) + b"}\n\n",
    b"data: [DONE]\n\n",
]
PRICED_FRAME = b'data: {"choices":[],"usage":' + orjson.dumps({**USAGE, "estimated_cost": COST}) + b"}\n\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router() -> AsyncIterator[RunningRouter]:
    async with run_router() as router:
        yield router


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = body["error"]
    return error


# Answers


@pytest.mark.parametrize(
    ("path", "engine_path"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/openai/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/completions", "/v1/completions"),
        ("/v1/openai/completions", "/v1/completions"),
    ],
)
@pytest.mark.parametrize("name", [MODEL, ALIAS])
async def test_a_whole_answer_comes_back_with_its_cost(
    path: str, engine_path: str, name: str, router: RunningRouter
) -> None:
    body = chat_body(model=name) if "chat" in path else orjson.dumps({"model": name, "prompt": "Once"})
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, router.fronting(engine.record):
        response = await router.client.post(path, content=body)
        assert response.status_code == 200
        assert response.json() == PRICED
        assert [(asked.path, asked.body) for asked in engine.asked] == [(engine_path, body)]


async def test_an_answer_without_usage_comes_back_byte_for_byte(router: RunningRouter) -> None:
    body = b'{ "choices" : [] , "text":"\\u00e9" }\n'
    async with Engine(answers(body)) as engine, router.fronting(engine.record):
        assert (await router.chat()).content == body


async def test_a_stream_comes_back_byte_for_byte_but_for_the_usage_nobody_asked_for(router: RunningRouter) -> None:
    async with Engine(streams(*FRAMES)) as engine, router.fronting(engine.record):
        response = await router.chat(stream=True)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.content == b"".join([*FRAMES[:2], FRAMES[3]])


async def test_only_the_final_usage_of_a_stream_is_changed(router: RunningRouter) -> None:
    whole = b"".join(FRAMES)
    pieces = [whole[at : at + 7] for at in range(0, len(whole), 7)]
    async with Engine(streams(*pieces)) as engine, router.fronting(engine.record):
        response = await router.chat(stream=True, stream_options={"include_usage": True})
    assert response.content == b"".join([*FRAMES[:2], PRICED_FRAME, FRAMES[3]])


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_a_chunk_reaches_the_client_before_the_next_is_made(options: Any, router: RunningRouter) -> None:
    has_arrived = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(FRAMES[0])
        await asyncio.wait_for(has_arrived.wait(), 2)
        await exchange.chunk(FRAMES[3])
        await exchange.end()

    async with Engine(script) as engine, router.fronting(engine.record):
        body = chat_body(stream=True, stream_options=options)
        async with router.client.stream("POST", "/v1/chat/completions", content=body) as response:
            chunks = response.aiter_raw()
            assert await anext(chunks) == FRAMES[0]
            has_arrived.set()
            assert b"".join([chunk async for chunk in chunks]) == FRAMES[3]


async def test_fields_without_effect_are_named_and_do_not_reach_the_engine(router: RunningRouter) -> None:
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, router.fronting(engine.record):
        fields = {"priority": 0, "store": True, "temprature": 1, "usage": {"include": True}}
        response = await router.chat(**fields, n=None, ignore_eos=None)
        assert response.headers["x-ignored-parameters"] == "priority, store, temprature"
        assert engine.asked[0].body == chat_body(usage={"include": True})
        assert "x-ignored-parameters" not in (await router.chat(user="me")).headers


async def test_many_at_once_get_their_own_answers(router: RunningRouter) -> None:
    async def echo(exchange: Exchange) -> None:
        await asyncio.sleep(0.01)
        await answers(orjson.dumps({"echo": orjson.loads(exchange.asked.body)["user"]}))(exchange)

    async with Engine(echo, "a") as a, Engine(echo, "b") as b, router.fronting(a.record, b.record):
        responses = await asyncio.gather(*(router.chat(user=str(number)) for number in range(40)))
        assert [response.json()["echo"] for response in responses] == [str(number) for number in range(40)]
        assert len(a.asked) + len(b.asked) == 40


# Lists


async def test_every_name_is_listed_with_the_model_behind_it(router: RunningRouter) -> None:
    small = dataclasses.replace(build_record("small", 1), max_model_len=1024)
    async with router.fronting(build_record("large", 2), small):
        for path in ("/v1/models", "/v1/openai/models", "/v1/models/"):
            listed = (await router.client.get(path)).json()
            assert listed["object"] == "list"
            assert [(card["id"], card["root"]) for card in listed["data"]] == [(MODEL, MODEL), (ALIAS, MODEL)]
            for card in listed["data"]:
                assert card["object"] == "model"
                assert abs(card["created"] - time.time()) < 100
                assert isinstance(card["created"], int)
                assert card["owned_by"] == "serving"
                assert (card["max_model_len"], card["ready_replicas"]) == (1024, 2)
                assert card["context_length"] == card["max_completion_tokens"] == 1024
                assert card["pricing"] == {
                    "prompt": "0.00000003",
                    "completion": "0.0000001",
                    "request": "0",
                    "image": "0",
                }


async def test_a_router_is_up_before_it_is_ready(router: RunningRouter) -> None:
    async with router.fronting():
        assert (await router.client.get("/health")).status_code == 200
        not_ready = await router.client.get("/ready")
        assert (not_ready.status_code, not_ready.json()) == (503, {"ready": False, "replicas": {MODEL: 0}})
        card = (await router.client.get("/v1/models")).json()["data"][0]
        assert (card["max_model_len"], card["ready_replicas"]) == (None, 0)
        router.records.append(dataclasses.replace(build_record("a", 1), state=ReplicaState.STARTING))
        assert (await router.client.get("/ready")).status_code == 503
        router.records.append(build_record("b", 2))
        ready = await router.client.get("/ready")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "replicas": {MODEL: 1}})


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_head_is_get_without_the_body(path: str, router: RunningRouter) -> None:
    async with router.fronting():
        response = await router.client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str(len((await router.client.get(path)).content))


# Refusals


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("POST", "/chat/completions", 404, "not_found"),
        ("POST", "/v1/openai/v1/chat/completions", 404, "not_found"),
        ("GET", "/v1/openai", 404, "not_found"),
        ("GET", "/v1/openai/health", 404, "not_found"),
        ("GET", "/metrics/%ff%0d%0a" + "x" * 500, 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/openai/completions", 405, "method_not_allowed"),
        ("HEAD", "/v1/completions", 405, None),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", "/ready", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_served_is_refused(
    method: str, path: str, status: int, code: str | None, router: RunningRouter
) -> None:
    async with router.fronting():
        response = await router.client.request(method, path)
        assert response.status_code == status
        if code is not None:
            error = error_of(response)
            assert (error["type"], error["code"]) == ("invalid_request_error", code)
            assert len(error["message"]) < 300


async def test_a_405_says_what_is_allowed(router: RunningRouter) -> None:
    async with router.fronting():
        response = await router.client.get("/v1/chat/completions")
        assert response.headers["allow"] == "POST, OPTIONS"


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"", 400, None, "invalid_json"),
        (b'{"model": ', 400, None, "invalid_json"),
        (b"[]", 400, None, "invalid_json"),
        (chat_body(model="gpt-9"), 404, "model", "model_not_found"),
        (chat_body(messages=[]), 400, "messages", None),
        (
            chat_body(messages=[{"role": "user", "content": [image_part(to_url(b"no image"))]}]),
            400,
            "messages[0].content[0].image_url",
            "invalid_image",
        ),
        (
            chat_body(messages=[{"role": "user", "content": [image_part(to_url(png_header(99_999, 99_999)))]}]),
            400,
            "messages[0].content[0].image_url",
            "image_too_large",
        ),
    ],
)
async def test_a_bad_request_never_reaches_an_engine(
    body: bytes, status: int, param: str | None, code: str | None, router: RunningRouter
) -> None:
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, router.fronting(engine.record):
        response = await router.client.post("/v1/chat/completions", content=body)
        error = error_of(response)
        assert (response.status_code, error["param"], error["code"]) == (status, param, code)
        assert error["type"] == "invalid_request_error"
        assert engine.asked == []
        assert (await router.chat()).status_code == 200


async def test_a_picture_reaches_the_engine_as_it_was_sent(router: RunningRouter) -> None:
    body = chat_body(messages=[{"role": "user", "content": [image_part(to_url(encode_image("PNG")))]}])
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, router.fronting(engine.record):
        assert (await router.client.post("/v1/chat/completions", content=body)).status_code == 200
        assert engine.asked[0].body == body[:-1] + b',"skip_special_tokens":false}'


def padded_body(size_bytes: int) -> bytes:
    return chat_body(user="x" * (size_bytes - len(chat_body(user=""))))


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), 10_000):
        yield body[at : at + 10_000]


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(("excess_bytes", "status"), [(0, 200), (1, 413), (3_000_000, 413)])
async def test_a_body_over_the_limit_is_refused(
    is_chunked: bool, excess_bytes: int, status: int, router: RunningRouter
) -> None:
    body = padded_body(MAX_BODY_BYTES + excess_bytes)
    assert len(body) == MAX_BODY_BYTES + excess_bytes
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, router.fronting(engine.record):
        content = in_chunks(body) if is_chunked else body
        response = await router.client.post("/v1/chat/completions", content=content)
        assert response.status_code == status
        if status == 413:
            error = error_of(response)
            assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
            assert engine.asked == []
        # The next one is served.
        assert (await router.chat()).status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"content-length: 999999999\r\nexpect: 100-continue\r\n\r\n", id="asks before sending"),
        pytest.param(b"content-length: 999999999\r\n\r\n" + b"x" * 700_000, id="sends twice the limit"),
        pytest.param(
            b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
            % (MAX_BODY_BYTES + 1, b"x" * (MAX_BODY_BYTES + 1)),
            id="goes over the limit at its very end",
        ),
    ],
)
async def test_a_refusal_does_not_wait_for_what_will_not_come(router: RunningRouter, request_: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + request_)
        async with asyncio.timeout(0.5):
            assert b" 413 " in await reader.readline()
    finally:
        writer.close()


async def test_a_client_that_never_sends_its_body_is_refused_in_the_end(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.http.bodies._DISCARD_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"content-length: 300001\r\n\r\n")
    async with asyncio.timeout(1):
        assert b" 413 " in await reader.readline()
    writer.close()


# What engines answer when they do not


@pytest.mark.parametrize(
    ("status", "message", "shown", "param", "code"),
    [
        (400, "temperature must be non-negative", "prompt has a value that", "prompt", "invalid_value"),
        (422, "Input should be a valid integer", "prompt has a value that", "prompt", "invalid_value"),
        (
            400,
            "This model's maximum context length is 2048 tokens.",
            "The prompt is too long for this model's context of 2048 tokens",
            "messages",
            "context_length_exceeded",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_refusal_of_the_engine_comes_in_openai_shape(
    status: int, message: str, shown: str, param: str, code: str, is_stream: bool, router: RunningRouter
) -> None:
    body = {"error": {"message": message, "type": "BadRequestError", "param": "prompt", "code": status}}
    async with (
        Engine(answers(orjson.dumps(body), status=status), "a") as a,
        Engine(answers(orjson.dumps(body), status=status), "b") as b,
        router.fronting(a.record, b.record),
    ):
        response = await router.chat(stream=is_stream)
        assert response.status_code == 400
        error = error_of(response)
        assert error.pop("message").startswith(shown)
        assert error == {"type": "invalid_request_error", "param": param, "code": code}
        assert len(a.asked) + len(b.asked) == 1, "a request at fault is not tried again"


async def test_a_failure_of_the_engine_is_told_without_its_words(router: RunningRouter) -> None:
    body = orjson.dumps({"error": {"message": "CUDA error in /opt/secret.py", "code": 500}})
    async with (
        Engine(answers(body, status=500), "a") as a,
        Engine(answers(body, status=500), "b") as b,
        router.fronting(a.record, b.record),
    ):
        response = await router.chat()
        assert response.status_code == 500
        assert (error_of(response)["type"], error_of(response)["code"]) == ("server_error", "internal_error")
        assert b"secret" not in response.content
        assert len(a.asked) + len(b.asked) == 1


async def test_without_a_replica_a_request_is_told_to_come_back(router: RunningRouter) -> None:
    draining = dataclasses.replace(build_record("draining", 1), state=ReplicaState.DRAINING)
    other = dataclasses.replace(build_record("other", 1), model="other")
    async with router.fronting(draining, other):
        response = await router.chat()
        assert response.status_code == 503
        assert error_of(response)["code"] == "no_replica"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_replica_that_refuses_connections_is_passed_over(is_stream: bool, router: RunningRouter) -> None:
    script = streams(*FRAMES) if is_stream else answers(orjson.dumps(ANSWER))
    with dead_replica("a") as first, dead_replica("c") as second:
        async with Engine(script, "b") as engine, router.fronting(first, engine.record, second):
            for _ in range(6):
                assert (await router.chat(stream=is_stream)).status_code == 200
            assert len(engine.asked) == 6


@pytest.mark.parametrize("script", [hang_up, answers(b"{}", status=503)])
async def test_a_replica_that_drops_requests_is_passed_over(script: Any, router: RunningRouter) -> None:
    async with (
        Engine(script, "bad") as bad,
        Engine(answers(orjson.dumps(ANSWER)), "good") as good,
        router.fronting(bad.record, good.record),
    ):
        for _ in range(16):
            assert (await router.chat()).json() == PRICED
        assert len(good.asked) == 16
        assert bad.asked, "the bad one was asked too"


async def test_when_every_replica_refuses_the_request_fails_as_unreachable(router: RunningRouter) -> None:
    with dead_replica("a") as first, dead_replica("b") as second:
        async with router.fronting(first, second):
            response = await router.chat()
            assert response.status_code == 502
            assert error_of(response)["code"] == "replica_unreachable"


async def test_a_replica_is_tried_once_and_no_more_than_max_tries_are() -> None:
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Engine(hang_up, f"{number}")) for number in range(4)]
        records = [engine.record for engine in engines]
        router = await stack.enter_async_context(run_router(*records, settings=build_settings(max_tries=3)))
        assert (await router.chat()).status_code == 502
        assert sorted(len(engine.asked) for engine in engines) == [0, 1, 1, 1]


async def test_a_replica_that_failed_a_request_does_not_get_it_again_for_being_idle(router: RunningRouter) -> None:
    async def busy(exchange: Exchange) -> None:
        is_first = len(good.asked) == 1
        await (streams_and_waits(asyncio.Event()) if is_first else answers(orjson.dumps(ANSWER)))(exchange)

    async with Engine(hang_up, "bad") as bad, Engine(busy, "good") as good, router.fronting(good.record):
        running = asyncio.create_task(router.chat())
        assert await eventually(lambda: len(good.asked) == 1)
        router.records.append(bad.record)
        assert (await router.chat()).status_code == 200
        assert (len(bad.asked), len(good.asked)) == (1, 2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_machine_that_is_switched_off_is_passed_over_after_the_connect_timeout() -> None:
    settings = build_settings(connect_timeout_s=0.2)
    async with contextlib.AsyncExitStack() as stack:
        deaf = stack.enter_context(deaf_replica())
        engine = await stack.enter_async_context(Engine(answers(orjson.dumps(ANSWER))))
        router = await stack.enter_async_context(run_router(deaf, engine.record, settings=settings))
        for _ in range(2):
            assert (await router.chat()).status_code == 200
        assert len(engine.asked) == 2


async def test_an_engine_that_says_nothing_times_out_and_is_not_tried_elsewhere() -> None:
    lefts = asyncio.Event(), asyncio.Event()
    settings = build_settings(read_timeout_s=0.2)
    async with (
        Engine(streams_and_waits(lefts[0]), "a") as a,
        Engine(streams_and_waits(lefts[1]), "b") as b,
        run_router(a.record, b.record, settings=settings) as router,
    ):
        response = await router.chat()
        assert response.status_code == 504
        assert (error_of(response)["type"], error_of(response)["code"]) == ("timeout_error", "replica_timeout")
        assert len(a.asked) + len(b.asked) == 1


async def test_an_engine_that_dies_in_the_middle_of_a_stream_is_told_as_an_event(router: RunningRouter) -> None:
    async with (
        Engine(dies_after(*FRAMES[:2]), "a") as a,
        Engine(dies_after(*FRAMES[:2]), "b") as b,
        router.fronting(a.record, b.record),
    ):
        response = await router.chat(stream=True)
        assert response.status_code == 200
        assert response.content.startswith(b"".join(FRAMES[:2]))
        assert b"[DONE]" not in response.content
        last = response.content.removeprefix(b"".join(FRAMES[:2]))
        event = orjson.loads(last.removeprefix(b"data: ").removesuffix(b"\n\n"))
        assert event["error"]["type"] == "server_error"
        assert event["error"]["code"] == "replica_unreachable"
        assert len(a.asked) + len(b.asked) == 1


# Clients that leave


@pytest.mark.parametrize("chunks", [(), (FRAMES[0],)], ids=["before the answer", "in the middle of it"])
async def test_a_client_that_leaves_closes_the_connection_to_the_engine(
    chunks: tuple[bytes, ...], router: RunningRouter
) -> None:
    left = asyncio.Event()
    async with Engine(streams_and_waits(left, *chunks)) as engine, router.fronting(engine.record):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        body = chat_body(stream=True)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        )
        async with asyncio.timeout(2):
            while chunks and FRAMES[0] not in await reader.readuntil(b"\n\n"):
                pass
            assert await eventually(lambda: bool(engine.asked))
        assert not router.app.is_idle
        writer.close()
        async with asyncio.timeout(1):
            await left.wait()


async def test_a_client_that_leaves_while_sending_is_forgotten(router: RunningRouter) -> None:
    async with Engine(answers(b"{}")) as engine, router.fronting(engine.record):
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"content-length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()
        assert (await router.chat()).status_code == 200
        assert len(engine.asked) == 1


# Balance


async def test_idle_replicas_share_the_requests(router: RunningRouter) -> None:
    script = answers(orjson.dumps(ANSWER))
    async with Engine(script, "a") as a, Engine(script, "b") as b, router.fronting(a.record, b.record):
        for _ in range(16):
            await router.chat()
            assert await router.is_idle()
        assert a.asked
        assert b.asked
        assert len(a.asked) + len(b.asked) == 16


async def test_running_requests_spread_by_the_size_of_replicas(router: RunningRouter) -> None:
    left = asyncio.Event()
    script = streams_and_waits(left)
    async with (
        Engine(script, "small", max_num_seqs=2) as small,
        Engine(script, "large", max_num_seqs=6) as large,
        router.fronting(small.record, large.record),
    ):
        waiting = [asyncio.create_task(router.chat()) for _ in range(8)]
        assert await eventually(lambda: len(small.asked) + len(large.asked) == 8)
        assert (len(small.asked), len(large.asked)) == (2, 6)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


# The app by itself


async def run_alone(app: RouterApp, path: str, *messages: Message) -> list[Message]:
    """One GET without a socket."""
    incoming = iter(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        return next(incoming)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
    return sent


async def test_a_bug_in_the_router_is_an_internal_error_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Any:
        raise ZeroDivisionError("secret")

    start, body = await run_alone(RouterApp(build_settings(), read_snapshot=fail), "/ready")
    assert start["status"] == 500
    assert orjson.loads(body["body"])["error"]["code"] == "internal_error"
    assert b"secret" not in body["body"]
    assert "ZeroDivisionError" in caplog.text


async def test_what_is_no_http_is_left_alone() -> None:
    async def never() -> Any:
        raise AssertionError

    await RouterApp(build_settings())({"type": "websocket"}, never, lambda _: never())


def http_scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "headers": headers}


def body_messages(*parts: bytes) -> list[Message]:
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, start=1)
    ]


async def read(scope: dict[str, Any], messages: list[Message], max_bytes: int) -> tuple[bytes, int]:
    """The body, and how many messages were left unread."""
    incoming = list(messages)

    async def receive() -> Message:
        if not incoming:
            await asyncio.Event().wait()  # as servers do: nothing comes before the client leaves
        return incoming.pop(0)

    async with asyncio.timeout(0.2):
        limits = LimitSettings.model_construct(max_body_bytes=max_bytes)
        return await read_body(scope, receive, limits), len(incoming)


@pytest.mark.parametrize("parts", [[b""], [b"abc"], [b"a", b"b", b"c"], [b"", b"abc", b""]])
async def test_a_body_is_read_to_its_end_and_no_further(parts: list[bytes]) -> None:
    messages = [*body_messages(*parts), {"type": "http.disconnect"}]
    assert await read(http_scope(), messages, max_bytes=3) == (b"".join(parts), 1)


@pytest.mark.parametrize("parts", [[b"abcd"], [b"abc", b"d"], [b"ab", b"cd", b"ef"]])
async def test_a_body_that_brings_too_much_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(BodyTooLargeError):
        await read(http_scope(), body_messages(*parts), max_bytes=3)


@pytest.mark.parametrize(("announced", "is_refused"), [(b"3", False), (b"4", True), (b"1e9", False), (b"", False)])
async def test_a_body_that_announces_too_much_is_not_read(announced: bytes, is_refused: bool) -> None:
    scope = http_scope((b"content-type", b"9"), (b"content-length", announced))
    with pytest.raises(BodyTooLargeError) if is_refused else contextlib.nullcontext():
        assert await read(scope, body_messages(b"abc"), max_bytes=3) == (b"abc", 0)


async def test_a_client_that_leaves_within_its_body_is_gone() -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}]
    with pytest.raises(ClientGoneError):
        await read(http_scope(), messages, max_bytes=3)
