"""`POST /v1/ocr/quote`: a real service and router, beside what the same documents are then billed for."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pypdfium2
import pytest
from support.ocr_service import build_service_settings, frame, run_host, run_service, tail
from support.papers import A4, encrypted_pdf, write_pdf
from support.router_stack import Engine, Exchange, MemoryJournal, RunningRouter, answers, build_settings, run_router

from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.settings.tenants import Tenant

CONFIG = (("base_size", 1024), ("image_size", 640), ("crop_mode", True))
IMAGE_TOKENS = {"tiny": 73, "small": 111, "base": 273, "large": 421}
"""Of a page, as the model's paper has its modes: rows of n tokens with a newline after each, and a separator."""


async def counts_as_the_model_does(exchange: Exchange) -> None:
    image = next(tokens for mode, tokens in IMAGE_TOKENS.items() if f'"mode":"{mode}"'.encode() in exchange.asked.body)
    await exchange.start()
    await exchange.chunk(frame("Hello", finish_reason="stop"))
    await exchange.chunk(tail(prompt=image + 7, completion=10, image=image))
    await exchange.end()


@contextlib.asynccontextmanager
async def run_counting(
    folder: Path, journal: MemoryJournal | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, Engine, RunningRouter]]:
    settings = build_service_settings(folder)
    async with (
        Engine(counts_as_the_model_does, max_num_seqs=16) as engine,
        run_router(
            dataclasses.replace(engine.record, image_config=CONFIG),
            settings=build_settings(limits=settings.router.limits),
            journal=journal,
        ) as router,
        run_host(settings, router.port) as (_, client),
    ):
        yield client, engine, router


def write_uneven_pdf(file: Path) -> Path:
    """Three pages, the second one too large to be drawn."""
    document = pypdfium2.PdfDocument.new()
    for size in (A4, (200_000, 200_000), A4):
        document.new_page(*size).close()
    document.save(file)
    document.close()
    return file


def holds(shown: dict[str, Any], value: Any) -> bool:
    return bool(type(value)(shown["least"]) <= value <= type(value)(shown["most"]))


@pytest.mark.parametrize("mode", list(IMAGE_TOKENS))
async def test_a_quote_is_what_the_document_is_billed_for(mode: str, tmp_path: Path) -> None:
    form: dict[str, Any] = {
        "data": {"model": "nano", "mode": mode, "max_tokens": "50", "pages": "2-3"},
        "files": {"file": ("x.pdf", write_pdf(tmp_path / "x.pdf", 3).read_bytes())},
    }
    journal = MemoryJournal()
    records = journal.records
    async with run_counting(tmp_path, journal) as (client, engine, router):
        answer = await client.post("/v1/ocr/quote", **form)
        assert answer.status_code == 200, answer.text
        assert (engine.asked, records) == ([], [])
        read = (await client.post("/v1/ocr", **form)).json()
        assert await router.is_idle()
    quoted = answer.json()
    assert (quoted["object"], quoted["model"], quoted["document"]) == ("quote", "nano", read["document"])
    assert (quoted["pages_quoted"], quoted["pages_failed"]) == (2, 0)
    assert quoted["image_tokens"] == read["usage"]["prompt_tokens_details"]["image_tokens"] == 2 * IMAGE_TOKENS[mode]
    assert quoted["image_tokens"] == sum(record.tokens.num_image_tokens for record in records)
    assert holds(quoted["prompt_tokens"], read["usage"]["prompt_tokens"])
    assert quoted["completion_tokens"] == {"least": 0, "most": 100}
    cost = Decimal(str(read["usage"]["estimated_cost"]))
    assert cost > 0
    assert holds(quoted["cost_dollars"], cost)
    for told, page in zip(quoted["pages"], read["pages"], strict=True):
        assert (told["index"], told["number"], told["status"]) == (page["index"], page["number"], "quoted")
        assert (told["dimensions"], told["image_tokens"]) == (page["dimensions"], page["usage"]["image_tokens"])
        assert holds(told["prompt_tokens"], page["usage"]["prompt_tokens"])
    for end in ("least", "most"):
        assert sum(page["prompt_tokens"][end] for page in quoted["pages"]) == quoted["prompt_tokens"][end]
        dollars = [Decimal(page["cost_dollars"][end]) for page in quoted["pages"]]
        assert sum(dollars) == Decimal(quoted["cost_dollars"][end])


async def test_a_page_that_cannot_be_drawn_costs_nothing(tmp_path: Path) -> None:
    pdf = base64.b64encode(write_uneven_pdf(tmp_path / "x.pdf").read_bytes()).decode()
    body = {"model": "nano", "mode": "tiny", "document": {"type": "file", "file": pdf}}
    async with run_counting(tmp_path) as (client, engine, _):
        found = (await client.post("/v1/openai/ocr/quote", json=body)).json()
        only = (await client.post("/v1/ocr/quote", json={**body, "pages": "2"})).json()
        assert engine.asked == []
    assert [page["status"] for page in found["pages"]] == ["quoted", "failed", "quoted"]
    failed = found["pages"][1]
    assert (failed["error"]["code"], failed["dimensions"]) == ("page_too_large", None)
    assert failed["cost_dollars"] == {"least": "0.000000000", "most": "0.000000000"}
    assert (found["image_tokens"], found["pages_quoted"], found["pages_failed"]) == (146, 2, 1)
    assert (only["pages_failed"], only["prompt_tokens"]) == (1, {"least": 0, "most": 0})


async def test_what_is_wrong_with_the_whole_is_an_error(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 2, (100, 100)).read_bytes()
    text, record = make_key("acme", created=datetime.now(UTC))
    keys = tmp_path / "keys.yaml"
    write_keys(keys, KeysFile(tenants={"acme": Tenant()}, keys=(record,)))
    mine = {"authorization": f"Bearer {text}"}
    async with run_service(tmp_path, keys_file=keys) as service:

        async def ask(data: bytes, **fields: Any) -> tuple[int, str]:
            answer = await service.upload(data, "/v1/ocr/quote", **{"headers": mine, **fields})
            return answer.status_code, str(answer.json().get("error", {}).get("code"))

        assert await ask(pdf) == (200, "None")
        assert await ask(pdf, headers={}) == (401, "invalid_api_key")
        assert await ask(pdf, model="no") == (404, "model_not_found")
        assert await ask(pdf, pages="3") == (400, "invalid_pages")
        assert await ask(pdf, mode="odd") == (400, "None")
        assert await ask(encrypted_pdf()) == (400, "encrypted_document")
        assert await ask(b"MZ" + bytes(2000)) == (400, "unsupported_document")
        assert (await service.client.post("/v1/ocr/quote", content=b"{", headers=mine)).status_code == 400
        assert (await service.client.get("/v1/ocr/quote")).status_code == 405
        assert service.engine.asked == []


async def test_no_replica_is_no_price(tmp_path: Path) -> None:
    settings = build_service_settings(tmp_path)
    form = {"model": "nano"}
    files = {"file": ("x.pdf", write_pdf(tmp_path / "x.pdf", 2, (100, 100)).read_bytes())}
    async with (
        run_router(settings=build_settings(limits=settings.router.limits)) as router,
        run_host(settings, router.port) as (_, client),
    ):
        answer = await client.post("/v1/ocr/quote", data=form, files=files)
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


@pytest.mark.parametrize("told", [b"[]", b"{}", b'{"cost_dollars": {"least": "1", "most": "x"}}', b"no"])
async def test_a_router_that_answers_something_else_is_said_to(told: bytes, tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 1, (100, 100)).read_bytes()
    async with (
        Engine(answers(told)) as other,
        run_host(build_service_settings(tmp_path), int(other.record.base_url.rpartition(":")[2])) as (_, client),
    ):
        answer = await client.post("/v1/ocr/quote", data={"model": "nano"}, files={"file": ("x.pdf", pdf)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_answer")
