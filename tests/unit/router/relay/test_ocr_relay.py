"""The router's relay to OCR services: a real router, and services that are real too or behave as a test says."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from support.ocr_service import BODY_BYTES, build_service_settings, reads, run_host
from support.papers import write_pdf
from support.router_stack import (
    Engine,
    Exchange,
    RunningRouter,
    answers,
    build_settings,
    dead_replica,
    dies_after,
    run_router,
    streams_and_waits,
)

from serving.cluster.directory import ServiceRecord
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.router.relay.ocr_relay import is_for_ocr
from serving.settings.ocr import OcrSettings
from serving.settings.router import LimitSettings
from serving.settings.stack import Settings
from serving.settings.tenants import Tenant


def with_ocr(settings: Settings | None = None, **ocr: object) -> Settings:
    base = settings or build_settings(limits=LimitSettings(max_body_bytes=BODY_BYTES))
    return base.model_copy(update={"ocr": OcrSettings.model_validate({"enabled": True, **ocr})})


def follow(router: RunningRouter, *urls: str) -> None:
    router.app.follow_services(tuple(ServiceRecord(f"s{n}", url) for n, url in enumerate(urls)))


async def test_a_document_goes_through_the_router_and_back(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 3, (100, 100)).read_bytes()
    form: dict[str, Any] = {"data": {"model": "nano", "format": "text"}, "files": {"file": ("x.pdf", pdf)}}
    async with (
        Engine(reads(), max_num_seqs=16) as engine,
        run_router(engine.record, settings=with_ocr()) as router,
        run_host(build_service_settings(tmp_path), router.port) as (host, _),
    ):
        follow(router, host.record.url)
        answer = await router.client.post("/v1/openai/ocr", **form)
        assert answer.status_code == 200, answer.text
        assert [page["text"] for page in answer.json()["pages"]] == ["Hello page"] * 3
        streamed = await router.client.post("/v1/ocr", data={**form["data"], "stream": "true"}, files=form["files"])
        assert streamed.text.endswith("data: [DONE]\n\n")
        job = (await router.client.post("/v1/ocr/jobs", **form)).json()
        assert (await router.client.delete(f"/v1/ocr/jobs/{job['id']}")).status_code == 204
        assert (await router.client.get("/v1/ocr/jobs?limit=x")).status_code == 400


async def test_without_a_service_it_says_so() -> None:
    async with run_router(settings=with_ocr()) as router:
        answer = await router.client.post("/v1/ocr", content=b"{}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_ocr_service")
        assert "retry-after" in answer.headers
    async with run_router() as router:
        for path in ("/", "/v1/ocr", "/v1/ocr/jobs", "/playground/app.js"):
            answer = await router.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_the_quote_of_a_document_is_the_services() -> None:
    body = orjson.dumps({"model": "nano", "document": {"type": "file", "file": "eA=="}})
    async with Engine(answers(b'{"object":"quote"}')) as service, run_router(settings=with_ocr()) as router:
        assert (await router.client.post("/v1/quote", content=body)).json()["error"]["code"] == "no_ocr_service"
        follow(router, service.record.base_url)
        answer = await router.client.post("/v1/openai/quote", content=body, headers={"authorization": "Bearer k"})
        assert (answer.status_code, answer.json()) == (200, {"object": "quote"})
        (asked,) = service.asked
        assert (asked.method, asked.path, asked.body) == ("POST", "/v1/ocr/quote", body)
        assert asked.headers["authorization"] == "Bearer k"
        packed = gzip.compress(b"\xef\xbb\xbf" + body)
        answer = await router.client.post("/v1/quote", content=packed, headers={"content-encoding": "gzip"})
        assert (answer.status_code, service.asked.pop().body) == (200, body)
        chats: list[dict[str, Any]] = [{"messages": []}, {"prompt": "a"}]
        for chat in chats:
            await router.client.post("/v1/quote", json={"model": "nano", "document": {}, **chat})
        assert len(service.asked) == 1
    async with run_router() as router:
        answer = await router.client.post("/v1/quote", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_one_that_cannot_be_reached_is_passed_over() -> None:
    async with Engine(answers(b'{"id":"ocr-1"}')) as service, run_router(settings=with_ocr()) as router:
        with dead_replica() as dead:
            follow(router, dead.base_url, service.record.base_url)
            for _ in range(3):
                answer = await router.client.post("/v1/ocr", content=b"{}")
                assert answer.json() == {"id": "ocr-1"}
        asked = service.asked[0]
        assert (asked.method, asked.path, asked.body) == ("POST", "/v1/ocr", b"{}")


async def test_a_stranger_gets_no_further(tmp_path: Path) -> None:
    text, record = make_key("acme", created=datetime.now(UTC))
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": Tenant()}, keys=(record,)))
    settings = with_ocr(build_settings(keys_file=file))
    async with Engine(answers(b"{}")) as service, run_router(settings=settings) as router:
        follow(router, service.record.base_url)
        assert (await router.client.post("/v1/ocr", content=b"{}")).status_code == 401
        assert service.asked == []
        assert (await router.client.get("/")).status_code == 200
        headers = {"authorization": f"Bearer {text}"}
        assert (await router.client.post("/v1/ocr", content=b"{}", headers=headers)).status_code == 200
        assert service.asked[-1].headers["authorization"] == f"Bearer {text}"
        tenant = (await router.client.get("/v1/tenant", headers=headers)).json()
        assert (tenant["id"], tenant["key_id"]) == ("acme", record.id)


async def test_a_client_that_leaves_is_missed_at_the_service() -> None:
    left = asyncio.Event()
    async with Engine(streams_and_waits(left, b"data: {}\n\n")) as service, run_router(settings=with_ocr()) as router:
        follow(router, service.record.base_url)
        async with router.client.stream("POST", "/v1/ocr", content=b"{}") as answer:
            async for _ in answer.aiter_bytes():
                break
            assert not router.app.is_idle, "whoever drains the router waits for documents too"
        await asyncio.wait_for(left.wait(), 5)
        assert await router.is_idle()


async def test_a_service_that_dies_ends_its_stream_with_an_error() -> None:
    async with Engine(dies_after(b"data: {}\n\n")) as service, run_router(settings=with_ocr()) as router:
        follow(router, service.record.base_url)
        answer = await router.client.post("/v1/ocr", content=b"{}")
        assert answer.text.startswith('data: {}\n\ndata: {"error":')
        assert "[DONE]" not in answer.text


async def test_a_service_that_says_nothing_is_an_error_with_a_status() -> None:
    async def hang_up(exchange: Exchange) -> None:
        await exchange.die()

    async with Engine(hang_up) as service, run_router(settings=with_ocr()) as router:
        follow(router, service.record.base_url)
        answer = await router.client.post("/v1/ocr", content=b"{}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_unreachable")


async def test_a_body_over_the_limit_is_cut_off() -> None:
    settings = with_ocr(build_settings(limits=LimitSettings(max_body_bytes=100_000)), max_document_bytes=100_000)

    async def read_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(2**16):
            pass
        writer.close()

    service = await asyncio.start_server(read_on, "127.0.0.1", 0)
    async with service, run_router(settings=settings) as router:
        follow(router, f"http://127.0.0.1:{service.sockets[0].getsockname()[1]}")

        async def pieces() -> AsyncIterator[bytes]:  # chunked: no length is announced
            for _ in range(40):
                yield bytes(10_000)

        answer = await router.client.post("/v1/ocr", content=pieces())
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_the_routers_document_tells_of_what_it_relays() -> None:
    async with run_router(settings=with_ocr()) as router:
        paths = (await router.client.get("/openapi.json")).json()["paths"]
    assert {path for path in paths if "ocr" in path} == {
        "/v1/ocr",
        "/v1/ocr/quote",
        "/v1/ocr/jobs",
        "/v1/ocr/jobs/{job_id}",
        "/v1/ocr/jobs/{job_id}/pages",
        "/v1/ocr/jobs/{job_id}/cancel",
    }
    async with run_router() as router:
        assert "/v1/ocr" not in (await router.client.get("/openapi.json")).json()["paths"]


def test_what_is_the_services_to_answer() -> None:
    assert all(map(is_for_ocr, ("", "/v1/ocr", "/v1/ocr/jobs", "/v1/ocr/jobs/x/pages", "/playground/app.js")))
    assert not any(map(is_for_ocr, ("/v1/ocrx", "/v1", "/v1/chat/completions", "/playground", "/health")))
