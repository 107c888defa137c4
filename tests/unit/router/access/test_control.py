"""Every route of a router is under access control: keys, the tenant's limits, and the memory that bodies may take.

The routes are read from the tables that serve and describe them, so one that is added later is tried too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from support.ocr_service import BODY_BYTES, build_service_settings, reads, run_host
from support.papers import write_pdf
from support.router_stack import Engine, RunningRouter, answers, build_settings, chat_body, run_router

from serving.billing.credits import CREDIT_HEADER, CreditSigner
from serving.cluster.directory import ServiceRecord
from serving.errors import RateLimitError
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.router.access.limits import DOCUMENT, GENERATION, LOOKUP, Charge, RequestKind
from serving.router.app import METHODS
from serving.router.lookups.openapi import build_document
from serving.router.lookups.routes import MODEL, QUOTE
from serving.settings.ocr import OcrSettings
from serving.settings.stack import Settings
from serving.settings.tenants import Identity, Tenant
from unit.router.test_generation import ANSWER

FREE = {"/health", "/ready", "/openapi.json", "/v1/models", "/v1/models/nano", "/v1/tenant", "/admin/state"}
FREE |= {"/metrics/targets"}
Target = tuple[str, str]


def router_routes() -> list[Target]:
    return [(method, path) for path, method in METHODS.items()] + [("GET", f"{MODEL}nano")]


def document_routes(settings: Settings) -> list[Target]:
    """Those that the router relays, as its OpenAPI document has them."""
    return [
        (operation.upper(), path.format(job_id="job-1"))
        for path, described in build_document(settings)["paths"].items()
        if path.startswith("/v1/ocr")
        for operation in described.keys() - {"parameters"}
    ]


class Office:
    """A router that asks for keys, and one tenant's."""

    def __init__(self, router: RunningRouter, identity: Identity, headers: dict[str, str]) -> None:
        self.router = router
        self.identity = identity
        self.headers = headers

    async def ask(self, method: str, path: str, content: bytes | None = None, **headers: str) -> httpx.Response:
        given = {"content-type": "application/json", **self.headers, **headers}
        return await self.router.client.request(method, path, content=content, headers=given)


def keyed(folder: Path, tenant: Tenant, *, is_admin: bool = True, **router: Any) -> tuple[Settings, str]:
    text, record = make_key("acme", created=datetime.now(UTC), is_admin=is_admin)
    file = folder / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": tenant}, keys=(record,)))
    settings = build_settings(keys_file=file, **router)
    ocr = OcrSettings(enabled=True, directory=folder / "ocr")
    return settings.model_copy(update={"ocr": ocr}), text


@contextlib.asynccontextmanager
async def run_office(folder: Path, tenant: Tenant, **router: Any) -> AsyncIterator[Office]:
    settings, text = keyed(folder, tenant, **router)
    async with (
        Engine(answers(orjson.dumps(ANSWER)), max_num_seqs=64) as engine,
        run_router(engine.record, settings=settings) as running,
        Engine(answers(b'{"id":"ocr-1"}')) as service,
    ):
        running.app.follow_services((ServiceRecord("s", service.record.base_url),))
        yield Office(running, Identity("acme", tenant), {"authorization": f"Bearer {text}"})


@contextlib.contextmanager
def counted(office: Office) -> Iterator[None]:
    """The tenant has one request of every kind under way."""
    limits = office.router.app.access.limits
    for charge in (GENERATION, DOCUMENT, LOOKUP):
        limits.admit(office.identity, time.monotonic(), charge)
    yield
    for charge in (GENERATION, DOCUMENT, LOOKUP):
        limits.leave(office.identity, charge)


def spend_the_minute(office: Office) -> None:
    """The tenant has nothing left of its requests per minute."""
    limits = office.router.app.access.limits
    for weight in (1.0, 0.1, 0.01):
        charge = Charge(RequestKind.LOOKUP, weight)
        with contextlib.suppress(RateLimitError):
            while True:
                limits.admit(office.identity, time.monotonic(), charge)
                limits.leave(office.identity, charge)


@pytest.mark.parametrize("tenant", [Tenant(max_concurrent=1), Tenant(requests_per_minute=1)])
async def test_no_route_that_works_for_a_tenant_is_free(tmp_path: Path, tenant: Tenant) -> None:
    async with run_office(tmp_path, tenant) as office:
        for method, path in [*router_routes(), *document_routes(office.router.app.settings)]:
            if tenant.requests_per_minute is not None:
                spend_the_minute(office)
            with counted(office) if tenant.max_concurrent else contextlib.nullcontext():
                answer = await office.ask(method, path, b"{}" if method == "POST" else None)
            if path in FREE:
                assert answer.status_code == 200, path
            else:
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded"), path
                assert "retry-after" in answer.headers, path


async def test_of_a_crowd_one_document_passes(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def wait(exchange: Any) -> None:
        await may_answer.wait()
        await answers(b'{"id":"ocr-1"}')(exchange)

    async with run_office(tmp_path, Tenant(max_concurrent=1)) as office, Engine(wait) as slow:
        office.router.app.follow_services((ServiceRecord("s", slow.record.base_url),))
        crowd = [asyncio.create_task(office.ask("POST", "/v1/ocr", b"{}")) for _ in range(20)]
        done, _ = await asyncio.wait(crowd, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 19:
            done, _ = await asyncio.wait(crowd, timeout=0.05)
        may_answer.set()
        statuses = [answer.status_code for answer in await asyncio.gather(*crowd)]
        assert sorted(statuses) == [200] + [429] * 19


BODIES = {
    "/v1/completions": b'{"model":"nano","prompt":"a"}',
    "/v1/messages": b'{"model":"nano","max_tokens":4,"messages":[{"role":"user","content":"a"}]}',
    "/v1/responses": b'{"model":"nano","input":"a"}',
    "/detokenize": b'{"model":"nano","tokens":[1]}',
    "/v1/detokenize": b'{"model":"nano","tokens":[1]}',
}
"""By route; the others take a chat's."""


@pytest.mark.parametrize("path", [path for path, method in METHODS.items() if method == "POST"])
async def test_no_route_reads_a_body_that_there_is_no_room_for(tmp_path: Path, path: str) -> None:
    async with run_office(tmp_path, Tenant()) as office:
        bodies = office.router.app.access.bodies
        body = BODIES.get(path, chat_body())
        assert (await office.ask("POST", path, body)).status_code == 200
        assert bodies.num_held_bytes == 0
        with bodies.open() as held:
            held.take(office.router.app.settings.router.limits.max_held_bytes)
            answer = await office.ask("POST", path, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


async def test_a_quote_of_a_document_is_held_until_it_is_answered(tmp_path: Path) -> None:
    seen: list[int] = []

    async def look(exchange: Any) -> None:
        seen.append(office.router.app.access.bodies.num_held_bytes)
        await answers(b"{}")(exchange)

    body = orjson.dumps({"model": "nano", "document": {"type": "file", "file": "eA=="}})
    async with run_office(tmp_path, Tenant(max_concurrent=1)) as office, Engine(look) as service:
        office.router.app.follow_services((ServiceRecord("s", service.record.base_url),))
        assert (await office.ask("POST", QUOTE, body)).status_code == 200
    assert seen == [len(body)]


# What a document's pages may do


async def test_a_tenant_with_one_request_at_once_has_its_documents_read(tmp_path: Path) -> None:
    settings, text = keyed(tmp_path, Tenant(max_concurrent=1), is_admin=False)
    limits = settings.router.limits.model_copy(update={"max_body_bytes": BODY_BYTES})
    settings = settings.model_copy(update={"router": settings.router.model_copy(update={"limits": limits})})
    pdf = write_pdf(tmp_path / "x.pdf", 3, (100, 100)).read_bytes()
    form = {"data": {"model": "nano", "format": "text"}, "files": {"file": ("x.pdf", pdf)}}
    headers = {"authorization": f"Bearer {text}"}
    async with (
        Engine(reads(), max_num_seqs=16) as engine,
        run_router(engine.record, settings=settings) as router,
        run_host(build_service_settings(tmp_path), router.port) as (host, _),
    ):
        router.app.follow_services((host.record,))
        router.client.timeout = httpx.Timeout(60)
        answer = await router.client.post("/v1/ocr", **form, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        assert [page["text"] for page in answer.json()["pages"]] == ["Hello page"] * 3
        quote = await router.client.post("/v1/ocr/quote", **form, headers=headers)  # type: ignore[arg-type]
        assert (quote.json()["pages_quoted"], quote.json()["pages_failed"]) == (3, 0)


async def test_only_a_services_own_quotes_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "ocr").mkdir()
    (tmp_path / "ocr" / "secret").write_bytes(b"shared")
    async with run_office(tmp_path, Tenant(requests_per_minute=1)) as office:
        assert (await office.ask("POST", QUOTE, chat_body())).status_code == 200
        for signer, status in ((CreditSigner(b"guessed"), 429), (CreditSigner(b"shared"), 200)):
            signed = {"x-request-id": "quote-1", CREDIT_HEADER: signer.sign("quote-1", 0)}
            assert (await office.ask("POST", QUOTE, chat_body(), **signed)).status_code == status


async def test_who_is_asked_for_does_not_pay(tmp_path: Path) -> None:
    """OCR services ask whose key it is with the key itself."""
    async with run_office(tmp_path, Tenant(requests_per_minute=2)) as office:
        for _ in range(5):
            assert (await office.ask("GET", "/v1/tenant")).status_code == 200
        assert (await office.ask("POST", "/v1/chat/completions", chat_body())).status_code == 200


# Headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/ocr", "/v1/quote", "/v1/models"])
@pytest.mark.parametrize("name", ["authorization", "x-request-timeout-ms", "x-request-id", "content-type"])
async def test_two_values_for_one_header_are_refused(tmp_path: Path, path: str, name: str) -> None:
    async with run_office(tmp_path, Tenant()) as office:
        key = office.headers["authorization"]
        first = {"authorization": key}.get(name, "1")
        others = [] if name == "authorization" else [("authorization", key)]
        method = "GET" if path == "/v1/models" else "POST"
        answer = await office.router.client.request(
            method, path, headers=[(name, first), (name, "2"), *others], content=chat_body()
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, name, "invalid_request_error")
        again = [(name, first), (name, first), *others]
        answer = await office.router.client.request(method, path, headers=again, content=chat_body())
        assert answer.json().get("error", {}).get("param") != name
