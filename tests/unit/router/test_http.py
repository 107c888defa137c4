"""What HTTP itself offers to clients of all kinds: codings, methods, old versions, other headers for the key, pages."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
from support.router_stack import (
    HEAD,
    MAX_BODY_BYTES,
    Engine,
    Exchange,
    RunningRouter,
    answers,
    build_settings,
    chat_body,
    eventually,
    run_router,
    streams,
    streams_and_waits,
)

from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.settings.router import RouterSettings
from serving.settings.tenants import Tenant

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
ANSWER = b'{"choices":[]}'
FRAMES = [b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"]
PAGE = "https://app.example.com"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router() -> AsyncIterator[RunningRouter]:
    async with run_router(settings=build_settings(cors_origins=(PAGE,))) as router:
        yield router


async def talk(router: RunningRouter, request: bytes, *, half_closes: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(request)
    if half_closes:
        writer.write_eof()
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


# Bodies


@pytest.mark.parametrize(
    ("coding", "content"), [("gzip", gzip.compress(chat_body(), mtime=0)), ("deflate", zlib.compress(chat_body()))]
)
async def test_a_compressed_body_reaches_the_engine_as_it_was(
    coding: str, content: bytes, router: RunningRouter
) -> None:
    async with Engine(answers(ANSWER)) as engine, router.fronting(engine.record):
        response = await router.client.post(CHAT, content=content, headers={"content-encoding": coding})
        assert response.status_code == 200
        assert engine.asked[0].body == chat_body()
        assert "content-encoding" not in engine.asked[0].headers


async def test_a_compressed_body_counts_as_it_was(router: RunningRouter) -> None:
    async with router.fronting():
        content = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
        response = await router.client.post(CHAT, content=content, headers={"content-encoding": "gzip"})
        assert response.status_code == 413
        response = await router.client.post(CHAT, content=content, headers={"content-encoding": "br"})
        assert (response.status_code, response.headers["accept-encoding"]) == (415, "gzip, deflate, zstd")


async def test_a_byte_order_mark_is_not_passed_on(router: RunningRouter) -> None:
    async with Engine(answers(ANSWER)) as engine, router.fronting(engine.record):
        response = await router.client.post(CHAT, content=b"\xef\xbb\xbf" + chat_body())
        assert response.status_code == 200
        assert engine.asked[0].body == chat_body()


@pytest.mark.parametrize(("size", "coding"), [(100_000, "gzip"), (1000, None)])
async def test_a_large_answer_is_compressed_if_asked_for(size: int, coding: str | None, router: RunningRouter) -> None:
    body = orjson.dumps({"text": "a" * size})
    async with Engine(answers(body)) as engine, router.fronting(engine.record):
        response = await router.client.post(CHAT, content=chat_body(), headers={"accept-encoding": "br, gzip"})
        assert response.headers.get("content-encoding") == coding
        assert response.content == body
        response = await router.client.post(CHAT, content=chat_body(), headers={"accept-encoding": "identity"})
        assert "content-encoding" not in response.headers
        assert response.content == body


# Methods and paths


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/models", "GET, HEAD, OPTIONS"), ("/health", "GET, HEAD, OPTIONS"), (CHAT, "POST, OPTIONS")],
)
async def test_options_and_refusals_name_the_same_methods(path: str, allowed: str, router: RunningRouter) -> None:
    async with router.fronting():
        asked = await router.client.options(path)
        assert (asked.status_code, asked.content, asked.headers["allow"]) == (204, b"", allowed)
        refused = await router.client.delete(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        head = await router.client.head(path)
        assert (head.status_code == 405) is ("HEAD" not in allowed)


async def test_options_of_the_server_itself(router: RunningRouter) -> None:
    answer = await talk(router, b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert b"allow: GET, HEAD, POST, OPTIONS\r\n" in answer


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models/", "/v1/openai//models"])
async def test_slashes_may_be_doubled(path: str, router: RunningRouter) -> None:
    async with router.fronting():
        assert (await talk(router, b"GET %b HTTP/1.0\r\n\r\n" % path.encode())).startswith(b"HTTP/1.1 200 ")


# Connections


async def test_http_1_0_gets_no_chunks(router: RunningRouter) -> None:
    async with Engine(streams(*FRAMES)) as engine, router.fronting(engine.record):
        body = chat_body(stream=True)
        head = b"POST %b HTTP/1.0\r\n%bcontent-length: %d\r\n\r\n" % (CHAT.encode(), HEAD, len(body))
        answer = await talk(router, head + body)
        headers, _, content = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in headers
        assert b"connection: close" in headers
        assert content == b"".join(FRAMES)


async def test_a_client_that_sends_no_more_gets_its_answer(router: RunningRouter) -> None:
    has_ended = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await has_ended.wait()
        await streams(*FRAMES)(exchange)

    async with Engine(script) as engine, router.fronting(engine.record):
        body = chat_body(stream=True)
        head = b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n" % (CHAT.encode(), HEAD, len(body))
        talking = asyncio.create_task(talk(router, head + body, half_closes=True))
        await asyncio.sleep(0.1)  # two interim answers
        has_ended.set()
        answer = await talking
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert b"HTTP/1.1 200 OK\r\n" in answer
        assert b"[DONE]" in answer


async def test_a_client_that_closes_before_its_answer_still_frees_the_engine(router: RunningRouter) -> None:
    left = asyncio.Event()
    async with Engine(streams_and_waits(left)) as engine, router.fronting(engine.record):
        body = chat_body()
        head = b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n" % (CHAT.encode(), HEAD, len(body))
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(head + body)
        assert await eventually(lambda: bool(engine.asked))
        writer.close()
        async with asyncio.timeout(2):
            await left.wait()


# Keys


async def test_the_key_may_be_in_any_of_three_headers(tmp_path: Path) -> None:
    text, record = make_key("acme", created=datetime.now(UTC))
    other, _ = make_key("acme", created=datetime.now(UTC))
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(record,)))
    async with run_router(settings=build_settings(keys_file=file)) as router:
        for headers in (
            {"authorization": f"Bearer {text}"},
            {"x-api-key": text},
            {"api-key": text},
            {"api-key": text, "authorization": f"Bearer {text}"},
        ):
            assert (await router.client.get("/v1/tenant", headers=headers)).json()["id"] == "acme"
        for headers in ({"api-key": text, "x-api-key": other}, {"x-api-key": text, "authorization": f"Bearer {other}"}):
            refused = await router.client.get("/v1/tenant", headers=headers)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "authorization")
        assert (await router.client.get("/v1/tenant", headers={"x-api-key": other})).status_code == 401


# Pages of other sites


async def test_a_browser_may_ask_before_it_has_a_key(tmp_path: Path) -> None:
    _, record = make_key("acme", created=datetime.now(UTC))
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(record,)))
    async with run_router(settings=build_settings(keys_file=file, cors_origins=("*",))) as router:
        wanted = "authorization,content-type,x-stainless-lang,x-stainless-os"
        asked = await router.client.options(
            CHAT,
            headers={
                "origin": PAGE,
                "access-control-request-method": "POST",
                "access-control-request-headers": wanted,
            },
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert asked.headers["access-control-allow-headers"] == wanted
        assert "POST" in asked.headers["access-control-allow-methods"]
        refused = await router.client.get("/v1/models", headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


async def test_a_page_of_an_allowed_origin_may_read_answers_and_no_other(router: RunningRouter) -> None:
    async with router.fronting():
        headers = {"origin": PAGE, "sec-fetch-site": "cross-site"}
        answer = await router.client.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == "*"
        assert answer.headers["vary"] == "origin"
        foreign = await router.client.get("/v1/models", headers={**headers, "origin": "https://evil.example.com"})
        assert foreign.status_code == 403
        assert "access-control-allow-origin" not in foreign.headers
        renamed = await router.client.get("/v1/models", headers={**headers, "host": "evil.example.com"})
        assert renamed.status_code == 403, "another name for this machine is refused whatever the origin"
        none = await router.client.get("/v1/models")
        assert "access-control-allow-origin" not in none.headers


async def test_every_page_may_come_only_with_a_key() -> None:
    with pytest.raises(ValueError, match="keys_file"):
        RouterSettings(cors_origins=("*",))
