"""Against a real router on a socket, with engines behind it that answer as a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from support.request_pictures import encode_image
from support.router_stack import (
    Engine,
    Exchange,
    Script,
    answers,
    build_settings,
    dies_after,
    run_router,
    streams,
    streams_and_waits,
)

from serving.billing.credits import CreditSigner
from serving.errors import ModeNotSupportedError
from serving.http.retry_after import read_retry_after
from serving.ocr.reading.pages import (
    Delta,
    Event,
    PageReader,
    PageReading,
    TryStarted,
    find_other_mode,
)
from serving.ocr.reading.request import ReadRequest
from serving.ocr.rendering.formats import DocumentFormat
from serving.ocr.rendering.pool import DrawnPage, OpenedDocument
from serving.ocr_api.options import ReadOptions
from serving.settings.ocr import OcrSettings, ReadSettings

PAGE = DrawnPage(encode_image("PNG"), "image/png", 30, 20)
DOCUMENT = OpenedDocument(Path("page.png"), DocumentFormat.PNG, 1, "acme")
REQUEST = ReadRequest(DOCUMENT, [0], ReadOptions("nano", mode="tiny"), "Free OCR.", "job-1")
DONE = b"data: [DONE]\n\n"


def frame(text: str, finish: str | None = None, stop: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, "stop_reason": stop}
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"


def usage(prompt: int = 100, completion: int = 10) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}
    details = {"prompt_tokens_details": {"multimodal_tokens": {"image": 73}}}
    return b'data: {"choices":[],"usage":' + orjson.dumps({**counts, **details}) + b"}\n\n"


READ = streams(frame("Hello "), frame("page", "stop"), usage(), DONE)
LOOPED = streams(frame("la la", "length", "repetition"), usage(), DONE)


def one_after_another(*scripts: Script) -> Script:
    left = list(scripts)

    async def script(exchange: Exchange) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(exchange)

    return script


@contextlib.asynccontextmanager
async def reading(script: Script, **settings: object) -> AsyncIterator[tuple[PageReader, Engine]]:
    async with Engine(script) as engine, run_router(engine.record) as router:
        read_settings = ReadSettings.model_validate({"page_timeout_s": 20, **settings})
        async with PageReader(f"http://127.0.0.1:{router.port}", read_settings) as reader:
            yield reader, engine


async def read(reader: PageReader, request: ReadRequest = REQUEST) -> tuple[list[Event], PageReading]:
    events = [event async for event in reader.read(PAGE, request, 0)]
    assert isinstance(events[-1], PageReading)
    return events, events[-1]


async def test_a_page_is_read_with_its_usage_and_cost() -> None:
    async with reading(READ) as (reader, engine):
        events, page = await read(reader)
    assert events[:3] == [TryStarted(1, "tiny"), Delta("Hello "), Delta("page")]
    assert (page.text, page.failure, page.num_tries, page.mode) == ("Hello page", None, 1, "tiny")
    assert (page.usage.prompt_tokens, page.usage.completion_tokens, page.usage.image_tokens) == (100, 10, 73)
    assert page.usage.cost_nanodollars > 0
    asked = orjson.loads(engine.asked[0].body)
    assert asked["mm_processor_kwargs"] == {"mode": "tiny"}
    assert asked["skip_special_tokens"] is False, "cells of tables are special tokens in some tokenizers"


async def test_what_a_page_was_charged_before_is_set_off_try_by_try() -> None:
    each = 100 * 30 + 10 * 100
    signer = CreditSigner(b"shared")
    asked: list[int] = []

    def sign(request_id: str, nanodollars: int) -> str:
        asked.append(nanodollars)
        return signer.sign(request_id, nanodollars)

    settings = build_settings().model_copy(update={"ocr": OcrSettings(secret=SecretStr("shared"))})
    async with (
        Engine(one_after_another(LOOPED, READ)) as engine,
        run_router(engine.record, settings=settings) as router,
        PageReader(f"http://127.0.0.1:{router.port}", ReadSettings(), sign_credit=sign) as reader,
    ):
        _, page = await read(reader, replace(REQUEST, charged={0: each + 500}))
    assert asked == [each + 500, 500]
    assert (page.num_tries, page.usage.completion_tokens) == (2, 20)
    assert page.usage.cost_nanodollars == 2 * each, "what both tries cost, the part that was charged before included"


async def test_what_frames_an_answer_is_no_part_of_the_page() -> None:
    cell = frame("</td><｜end▁of▁sentence｜>", "stop")
    script = streams(frame("<｜begin▁of▁sentence｜><td>1"), cell, usage(), DONE)
    async with reading(script) as (reader, _):
        _, page = await read(reader)
    assert page.text == "<td>1</td>"


async def test_a_page_that_looped_is_read_in_another_mode_and_both_are_paid() -> None:
    async with reading(one_after_another(LOOPED, READ)) as (reader, engine):
        events, page = await read(reader)
    assert [event.mode for event in events if isinstance(event, TryStarted)] == ["tiny", "small"]
    assert [orjson.loads(asked.body)["mm_processor_kwargs"]["mode"] for asked in engine.asked] == ["tiny", "small"]
    assert (page.text, page.failure, page.num_tries, page.mode) == ("Hello page", None, 2, "small")
    assert page.usage.completion_tokens == 20


async def test_a_page_that_loops_in_every_mode_fails_with_what_it_cost() -> None:
    async with reading(LOOPED, max_tries=10) as (reader, engine):
        _, page = await read(reader)
    assert len(engine.asked) == 5
    assert page.failure is not None
    assert (page.failure.code, page.text, page.usage.completion_tokens) == ("repetition", "la la", 50)


async def test_a_page_that_looped_keeps_what_was_read_of_a_model_with_one_mode() -> None:
    body = orjson.dumps(ModeNotSupportedError("This model reads pages in one resolution mode.").body())
    async with reading(one_after_another(LOOPED, answers(body, 400))) as (reader, engine):
        _, page = await read(reader)
    assert len(engine.asked) == 2
    assert page.failure is not None
    assert (page.failure.code, page.text, page.mode) == ("repetition", "la la", "tiny")
    assert page.usage.completion_tokens == 10


async def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    async with reading(one_after_another(dies_after(frame("lost")), READ)) as (reader, _):
        _, page = await read(reader)
    assert (page.text, page.num_tries, page.failure) == ("Hello page", 2, None)


async def test_tries_end() -> None:
    async with reading(dies_after(frame("lost")), max_tries=2) as (reader, engine):
        _, page = await read(reader)
    assert len(engine.asked) == 2
    assert page.failure is not None
    assert page.text == "lost"


async def test_a_refusal_for_good_is_not_tried_again() -> None:
    async with reading(answers(b'{"error":{"message":"no","type":"BadRequestError","code":400}}', 400)) as (
        reader,
        engine,
    ):
        _, page = await read(reader)
    assert len(engine.asked) == 1
    assert page.failure is not None
    assert page.failure.status == 400


async def test_a_refusal_by_the_router_has_its_code() -> None:
    async with reading(READ) as (reader, _):
        _, page = await read(reader, replace(REQUEST, options=ReadOptions("other")))
    assert page.failure is not None
    assert (page.failure.code, page.failure.status, page.num_tries) == ("model_not_found", 404, 1)


async def test_a_silent_engine_ends_with_the_pages_time() -> None:
    async with reading(streams_and_waits(asyncio.Event(), frame("x")), page_timeout_s=0.3) as (reader, _):
        _, page = await read(reader)
    assert page.failure is not None
    assert (page.failure.code, page.text) == ("timeout", "x")


async def test_who_stops_listening_ends_the_generation() -> None:
    left = asyncio.Event()
    async with reading(streams_and_waits(left, frame("x"))) as (reader, _):
        events = reader.read(PAGE, REQUEST, 0)
        async for event in events:
            if isinstance(event, Delta):
                break
        await events.aclose()
        await asyncio.wait_for(left.wait(), 2)


async def test_nobody_there_is_a_failure_and_no_exception() -> None:
    async with PageReader("http://127.0.0.1:1", ReadSettings(max_tries=2)) as reader:
        _, page = await read(reader)
    assert page.failure is not None
    assert (page.failure.code, page.num_tries) == ("connection_lost", 2)


async def test_the_routers_wait_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    asleep = asyncio.sleep

    async def sleep(pause_s: float, *rest: Any) -> None:
        if pause_s >= 7:
            pauses.append(pause_s)
        else:
            await asleep(pause_s, *rest)

    async def busy(exchange: Exchange) -> None:
        await exchange.write(b"HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\n{}")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    async with Engine(one_after_another(busy, READ)) as engine:
        async with PageReader(engine.record.base_url, ReadSettings()) as reader:
            _, page = await read(reader)
        assert (page.text, page.num_tries) == ("Hello page", 2)
        assert len(pauses) == 1
        async with PageReader(engine.record.base_url, ReadSettings(max_wait_s=5)) as reader:
            engine.script = busy
            _, page = await read(reader)
        assert page.num_tries == 1


def test_another_mode_has_more_tokens_first() -> None:
    assert find_other_mode("base", ["base"]) == "large"
    assert find_other_mode("gundam", ["base", "gundam"]) == "large"
    assert find_other_mode(None, []) == "large"
    assert find_other_mode("tiny", ["tiny", "small", "base", "large", "gundam"]) is None


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "2", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], wait_s: float | None) -> None:
    assert read_retry_after(headers) == wait_s
