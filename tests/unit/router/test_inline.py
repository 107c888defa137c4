"""The engine's app in the router's own process: the same answers and records as over the network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.billing.records import Outcome, RequestRecord, TokenCounts
from serving.directory import Snapshot
from serving.http_server import HttpServer
from serving.router.app import RouterApp
from serving.router.inline import Inline

from .stack import COST, HEAD, USAGE, build_record, build_settings, chat_body, connect, eventually

ANSWER = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": USAGE}
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE_FRAME = b'data: {"choices":[],"usage":' + orjson.dumps(USAGE) + b"}\n\n"
DONE = b"data: [DONE]\n\n"
TOLD = {"prompt_tokens": 300, "image_tokens": 0, "cached_tokens": 0, "completion_tokens": 40, "is_finished": True}


class Server:
    """An OpenAI server as vLLM's is made: Starlette, which watches for the client's departure itself."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.frames: list[bytes] = [TEXT, USAGE_FRAME, DONE]
        self.error: tuple[int, Any] | None = None
        self.hangs = False
        self.was_left = asyncio.Event()
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        body = await request.body()
        self.requests.append((dict(request.headers), body))
        if self.error is not None:
            return JSONResponse(self.error[1], self.error[0])
        if orjson.loads(body).get("stream"):
            return StreamingResponse(self.stream(), media_type="text/event-stream")
        if self.hangs:
            while (await request.receive())["type"] != "http.disconnect":  # as vLLM does
                pass
            self.was_left.set()
        return JSONResponse(ANSWER)

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            for frame in self.frames:
                yield frame
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.was_left.set()


class Replica:
    def __init__(self, server: Server, app: RouterApp, client: httpx.AsyncClient, port: int) -> None:
        self.server = server
        self.app = app
        self.client = client
        self.port = port
        self.records: list[RequestRecord] = []

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", content=chat_body(**fields))

    async def only(self) -> RequestRecord:
        assert await eventually(lambda: bool(self.records))
        (record,) = self.records
        return record


@contextlib.asynccontextmanager
async def running(server: Server) -> AsyncIterator[Replica]:
    records: list[RequestRecord] = []
    snapshot = Snapshot((1, 1), (build_record("self", 1),))
    app = RouterApp(
        build_settings(),
        lambda: snapshot,
        backend=Inline(server.app, lambda request_id: TOLD, "sesame"),
        on_record=records.append,
    )
    http = HttpServer(app, host="127.0.0.1", port=0, drain_s=1, limits=app.settings.router.limits)
    await app.start()
    await http.start()
    try:
        async with connect(http.port, 5) as client:
            replica = Replica(server, app, client, http.port)
            replica.records = records
            yield replica
            assert await eventually(lambda: app.is_idle)
    finally:
        await http.stop()
        await app.close()


async def test_a_whole_answer_comes_with_its_cost() -> None:
    async with running(Server()) as replica:
        response = await replica.chat()
        assert response.json() == {**ANSWER, "usage": {**USAGE, "estimated_cost": COST}}
        record = await replica.only()
    assert (record.outcome, record.replica_id, record.finish_reason) == (Outcome.COMPLETED, "self", "stop")
    assert record.tokens == TokenCounts(num_prompt_tokens=1000, num_completion_tokens=500)


async def test_the_app_gets_the_body_as_it_came_with_the_stacks_own_key() -> None:
    async with running(Server()) as replica:
        await replica.client.post(
            "/v1/chat/completions", content=chat_body(user="me"), headers={"authorization": "Bearer the-clients"}
        )
        ((headers, body),) = replica.server.requests
        assert body == chat_body(user="me")
        assert headers["authorization"] == "Bearer sesame"
        assert headers["x-request-id"] == (await replica.only()).request_id


@pytest.mark.parametrize("asks_for_usage", [True, False])
async def test_a_stream_passes_and_is_counted(asks_for_usage: bool) -> None:
    async with running(Server()) as replica:
        response = await replica.chat(stream=True, stream_options={"include_usage": asks_for_usage})
        assert response.content.startswith(TEXT)
        assert response.content.endswith(DONE)
        assert (b"estimated_cost" in response.content) is asks_for_usage
        assert (await replica.only()).tokens.num_completion_tokens == 500


async def test_a_stream_that_ends_early_is_told() -> None:
    server = Server()
    server.frames = [TEXT]
    async with running(server) as replica:
        response = await replica.chat(stream=True)
        record = await replica.only()
    assert response.content.startswith(TEXT)
    assert orjson.loads(response.content.split(b"data: ")[-1])["error"]["code"] == "internal_error"
    assert (record.outcome, record.cost_nanodollars) == (Outcome.FAILED, 0)


@pytest.mark.parametrize(("status", "shown", "outcome"), [(400, 400, Outcome.REFUSED), (500, 500, Outcome.FAILED)])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_an_error_comes_in_openai_shape(status: int, shown: int, outcome: Outcome, is_stream: bool) -> None:
    server = Server()
    server.error = (status, {"error": {"message": "in /opt/secret.py", "code": status}})
    async with running(server) as replica:
        response = await replica.chat(stream=is_stream)
        assert response.status_code == shown
        assert list(response.json()["error"]) == ["message", "type", "param", "code"]
        assert (b"secret" in response.content) is (status == 400)
        assert (await replica.only()).outcome is outcome


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_ends_the_request_and_is_billed(is_stream: bool) -> None:
    server = Server()
    server.hangs = True
    server.frames = [TEXT]
    async with running(server) as replica:
        _, writer = await asyncio.open_connection("127.0.0.1", replica.port)
        body = chat_body(stream=is_stream)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        )
        assert await eventually(lambda: bool(server.requests))
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(1):
            await server.was_left.wait()
        record = await replica.only()
    assert record.outcome is Outcome.ABORTED
    assert (record.tokens.num_completion_tokens, record.cost_nanodollars) == (40, 13_000)


async def test_a_request_ends_when_its_time_is_over() -> None:
    server = Server()
    server.hangs = True
    server.frames = [TEXT]
    async with running(server) as replica:
        response = await replica.client.post(
            "/v1/chat/completions", content=chat_body(stream=True), headers={"x-request-timeout-ms": "100"}
        )
        assert b"request_timeout" in response.content
        async with asyncio.timeout(1):
            await server.was_left.wait()
        assert (await replica.only()).outcome is Outcome.TIMED_OUT
