"""A router and an OCR service that ask for no keys, seen from a web page that is none of theirs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import httpx
import orjson
import pytest
from support.ocr_service import build_service_settings, reads, run_host, run_service
from support.papers import write_pdf
from support.router_stack import Engine, answers, build_settings, chat_body, run_router

from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.settings.tenants import Tenant
from unit.router.relay.test_ocr_relay import follow, with_ocr
from unit.router.test_generation import ANSWER

FOREIGN = [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}]
CHAT = "/v1/chat/completions"


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


@pytest.mark.parametrize("headers", FOREIGN)
async def test_a_foreign_page_gets_nothing_of_a_router_without_keys(headers: dict[str, str]) -> None:
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, run_router(engine.record) as router:
        for method, path in [
            ("GET", "/admin/state"),
            ("GET", "/v1/models"),
            ("GET", "/openapi.json"),
            ("POST", CHAT),
            ("POST", "/v1/openai/chat/completions"),
            ("POST", "/v1/quote"),
        ]:
            content = chat_body() if method == "POST" else None
            answer = await router.client.request(method, path, content=content, headers=headers)
            assert answer.status_code == 403, path
            assert code(answer) in ("host_not_allowed", "origin_not_allowed")
        assert engine.asked == []
        assert (await router.client.get("/ready", headers=headers)).status_code == 200
        assert (await router.client.post(CHAT, content=chat_body())).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_a_body_that_any_page_may_send_is_not_read(kind: str) -> None:
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, run_router(engine.record) as router:
        answer = await router.client.post(CHAT, content=chat_body(), headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-type")
        assert "application/json" in answer.json()["error"]["message"]
        assert engine.asked == []


@pytest.mark.parametrize("headers", [*FOREIGN, {"content-type": "text/plain"}])
async def test_with_keys_nobody_is_asked_where_he_comes_from(tmp_path: Path, headers: dict[str, str]) -> None:
    text, record = make_key("acme", created=datetime.now(UTC))
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(record,)))
    settings = build_settings(keys_file=file)
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, run_router(engine.record, settings=settings) as router:
        given = {"authorization": f"Bearer {text}", **headers}
        assert (await router.client.post(CHAT, content=chat_body(), headers=given)).status_code == 200


async def test_an_operator_may_allow_a_name() -> None:
    settings = build_settings(allowed_hosts=("ocr.example",))
    async with Engine(answers(orjson.dumps(ANSWER))) as engine, run_router(engine.record, settings=settings) as router:
        given = {"host": "ocr.example", "origin": "https://ocr.example"}
        assert (await router.client.post(CHAT, content=chat_body(), headers=given)).status_code == 200


@pytest.mark.parametrize("headers", FOREIGN)
async def test_a_foreign_page_gets_nothing_of_documents(tmp_path: Path, headers: dict[str, str]) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 1, (100, 100)).read_bytes()
    form = {"data": {"model": "nano"}, "files": {"file": ("x.pdf", pdf)}}
    async with (
        Engine(reads(), max_num_seqs=16) as engine,
        run_router(engine.record, settings=with_ocr()) as router,
        run_host(build_service_settings(tmp_path), router.port) as (host, client),
    ):
        follow(router, host.record.url)
        for asked in (router.client, client):
            answer = await asked.post("/v1/ocr", **form, headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 403, answer.text
            assert (await asked.get("/v1/ocr/jobs", headers=headers)).status_code == 403
            answer = await asked.post("/v1/ocr", content=b"{}", headers={"content-type": "text/plain"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-type")
        assert engine.asked == []
        own = {"origin": f"http://127.0.0.1:{router.port}", "sec-fetch-site": "same-origin"}
        answer = await router.client.post("/v1/ocr", **form, headers=own)  # type: ignore[arg-type]
        assert answer.status_code == 200, "the playground's own page"


@pytest.mark.parametrize("headers", FOREIGN)
async def test_a_service_whose_router_asks_for_keys_answers_anywhere(tmp_path: Path, headers: dict[str, str]) -> None:
    text, record = make_key("acme", created=datetime.now(UTC))
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(record,)))
    async with run_service(tmp_path, keys_file=file) as service:
        given = {"authorization": f"Bearer {text}", **headers}
        assert (await service.client.get("/v1/ocr/jobs", headers=given)).status_code == 200
        assert (await service.client.get("/v1/ocr/jobs", headers=headers)).status_code == 401
