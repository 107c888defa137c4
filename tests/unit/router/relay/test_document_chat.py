"""Chats about PDFs: a real router and a real OCR service, in front of an engine that reads every page alike."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.ocr_service import build_service_settings, reads, run_host
from support.papers import write_pdf
from support.request_pictures import encode_image, image_part, to_url
from support.router_stack import MODEL, Engine, RunningRouter, answers, build_settings, run_router, streams

from serving.errors import InvalidRequestError
from serving.router.relay.document_chat import build_reading
from serving.router.request.parsing import parse_request
from unit.router.relay.test_ocr_relay import follow, with_ocr

CHAT = "/v1/chat/completions"
PDF = "data:application/pdf;base64,JVBERi0xLjc="
PART = {"type": "file", "file": {"file_data": PDF, "filename": "a.pdf"}}
PAGES = [
    {"index": 1, "number": 2, "status": "completed", "markdown": "two", "finish_reason": "stop"},
    {"index": 0, "number": 1, "status": "completed", "markdown": "one", "finish_reason": "length"},
    {"index": 2, "number": 3, "status": "failed", "error": {"message": "It is damaged.", "code": "damaged_page"}},
]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "estimated_cost": 0.1, "pages_processed": 2}


def chat(*parts: Any, **fields: Any) -> bytes:
    return orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": list(parts)}], **fields})


def reading_of(*parts: Any, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    return build_reading(parse_request(CHAT, chat(*parts, **fields), build_settings()))


@asynccontextmanager
async def service(engine: Engine) -> AsyncIterator[RunningRouter]:
    async with engine, run_router(settings=with_ocr()) as router:
        follow(router, engine.record.base_url)
        yield router


async def test_a_pdf_in_a_chat_is_read_page_by_page(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 2, (100, 100)).read_bytes()
    data = "data:application/pdf;base64," + base64.b64encode(pdf).decode()
    part = {"type": "file", "file": {"file_data": data, "filename": "x.pdf"}}
    async with (
        Engine(reads(), max_num_seqs=16) as engine,
        run_router(engine.record, settings=with_ocr()) as router,
        run_host(build_service_settings(tmp_path), router.port) as (host, _),
    ):
        follow(router, host.record.url)
        answer = await router.client.post(CHAT, content=chat(part, {"type": "text", "text": "Free OCR."}))
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["choices"][0]["message"]["content"] == "Hello page\n\nHello page"
        assert body["usage"]["completion_tokens"] > 0
        assert body["usage"]["estimated_cost"] > 0
        assert body["object"] == "chat.completion"
        response = await router.client.post(
            "/v1/responses",
            json={"model": MODEL, "input": [{"role": "user", "content": [{"type": "input_file", "file_data": data}]}]},
        )
        assert response.json()["output"][0]["content"][0]["text"] == "Hello page\n\nHello page"


def test_the_chats_text_is_the_prompt_for_every_page() -> None:
    text = {"type": "text", "text": "Free OCR."}
    reading, ignored = reading_of(PART, text, max_tokens=9, temperature=0, stream=True, user="me")
    assert reading == {
        "model": MODEL,
        "document": {"type": "document_url", "document_url": PDF},
        "stream": True,
        "prompt": "Free OCR.",
        "max_tokens": 9,
    }
    assert ignored == ["temperature"]
    assert "prompt" not in reading_of(PART)[0]


@pytest.mark.parametrize(
    ("parts", "fields"),
    [((PART, PART), {}), ((PART, image_part(to_url(encode_image("PNG")))), {}), ((PART,), {"n": 2})],
)
def test_a_chat_is_about_one_document(parts: tuple[Any, ...], fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        reading_of(*parts, **fields)


async def test_pages_come_in_order_with_comments_for_those_that_failed() -> None:
    body = orjson.dumps({"pages": sorted(PAGES, key=lambda page: str(page["number"])), "usage": USAGE})
    async with service(Engine(answers(body))) as router:
        answer = (await router.client.post(CHAT, content=chat(PART))).json()
        assert answer["choices"][0]["message"]["content"] == (
            "one\n\ntwo\n\n<!-- page 3 could not be read: damaged_page -->"
        )
        assert (answer["choices"][0]["finish_reason"], answer["usage"]) == ("length", USAGE)


async def test_a_stream_sends_pages_in_order() -> None:
    events: list[dict[str, Any]] = [
        {"type": "document", "id": "o", "pages": [0, 1, 2]},
        {"type": "page.started", "index": 0},
        *({"type": f"page.{page['status']}", "index": page["index"], "page": page} for page in PAGES),
        {"type": "result", "usage": USAGE},
    ]
    frames = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events]
    whole = b"".join([*frames, b"data: [DONE]\n\n"])
    async with service(Engine(streams(whole[:50], whole[50:]))) as router:
        body = chat(PART, stream=True, stream_options={"include_usage": True})
        text = (await router.client.post(CHAT, content=body)).text
        chunks = [orjson.loads(frame[6:]) for frame in text.split("\n\n")[:-2]]
        contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]]
        assert contents == ["", "one", "\n\ntwo", "\n\n<!-- page 3 could not be read: damaged_page -->", None]
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], USAGE)
        assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_document_of_which_no_page_can_be_read_is_an_error(is_stream: bool) -> None:
    events = [
        {"type": "document", "pages": [2]},
        {"type": "page.failed", "index": 2, "page": PAGES[2]},
        {"type": "result", "usage": USAGE},
    ]
    frames = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events]
    script = streams(*frames) if is_stream else answers(orjson.dumps({"pages": [PAGES[2]], "usage": USAGE}))
    async with service(Engine(script)) as router:
        answer = await router.client.post(CHAT, content=chat(PART, stream=is_stream))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["message"]) == (400, "damaged_page", "It is damaged.")
        assert error["param"] == "messages[0].content[0].file.file_data"


async def test_a_refusal_of_the_service_names_the_chats_field() -> None:
    error = {"message": "This is no document.", "type": "invalid_request_error", "param": "document", "code": "x"}
    async with service(Engine(answers(orjson.dumps({"error": error}), status=400))) as router:
        answer = await router.client.post(CHAT, content=chat(PART))
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": {**error, "param": "messages[0].content[0].file.file_data"}},
        )


async def test_without_an_ocr_service_it_says_so() -> None:
    async with run_router() as router:
        assert (await router.client.post(CHAT, content=chat(PART))).status_code == 404
    async with run_router(settings=with_ocr()) as router:
        answer = await router.client.post(CHAT, content=chat(PART))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_ocr_service")


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [("invalid_request_error", "damaged_page", 400), ("server_error", "connection_lost", 502)],
)
async def test_a_chat_whose_pages_all_failed_tells_whose_fault_that_is(kind: str, code: str, status: int) -> None:
    error = {"message": "It was not read.", "type": kind, "code": code}
    found = {"pages": [{"index": 0, "number": 1, "status": "failed", "error": error}], "usage": USAGE}
    async with service(Engine(answers(orjson.dumps(found)))) as router:
        answer = await router.client.post(CHAT, content=chat(PART))
    assert (answer.status_code, answer.json()["error"]["type"], answer.json()["error"]["code"]) == (status, kind, code)
