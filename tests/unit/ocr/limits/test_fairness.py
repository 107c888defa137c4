"""Two tenants at one service: one takes all that it can get, first; the other one is served all the same."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.ocr_service import RunningService, reads, run_host, run_service
from support.papers import slow_pdf, write_pdf
from support.router_stack import Script, eventually

from serving.ocr.host import OcrHost
from serving.ocr.rendering.pool import Renderer
from serving.ocr.rendering.worker_process import RenderWorker
from serving.settings.billing import BillingSettings
from unit.ocr.jobs.test_jobs import make_keys

SLOW_BYTES = 50_000
"""A PDF of a thousand pages is larger, one of a dozen smaller."""


@dataclass
class Drawing:
    """What workers are asked for."""

    num_slow: int = 0
    """Orders of the slow documents that have begun."""
    waits: list[int] = field(default_factory=list)
    """For each order of the others, how many of the slow ones were begun while it waited."""


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Drawing:
    found = Drawing()
    seen: ContextVar[int] = ContextVar("seen")
    begin = RenderWorker.ask

    def counted(queue: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def queued(*arguments: Any) -> Any:
            seen.set(found.num_slow)
            return await queue(*arguments)

        return queued

    async def begun(worker: Any, request: dict[str, Any], *rest: Any) -> Any:
        if Path(request["file"]).stat().st_size > SLOW_BYTES:  # noqa: ASYNC240  of a local file
            found.num_slow += 1
        else:
            found.waits.append(found.num_slow - seen.get())
        return await begin(worker, request, *rest)

    for name in ("open", "draw"):
        monkeypatch.setattr(Renderer, name, counted(getattr(Renderer, name)))
    monkeypatch.setattr(RenderWorker, "ask", begun)
    return found


@pytest.fixture
def billing(make_settings: Any) -> BillingSettings:
    found: BillingSettings = make_settings()
    return found


@contextlib.asynccontextmanager
async def served(
    folder: Path, script: Script | None = None, **ocr: Any
) -> AsyncIterator[tuple[RunningService, dict[str, str], dict[str, str]]]:
    """A service, and the keys of two tenants."""
    keys_file, (hostile, other) = make_keys(folder, "hostile", "other")
    async with run_service(folder, script, keys_file=keys_file, **ocr) as service:
        yield service, hostile, other


@contextlib.contextmanager
def ending(tasks: list[asyncio.Task[Any]]) -> Iterator[None]:
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize("path", ["/v1/ocr", "/v1/ocr/quote", "/v1/ocr/jobs"])
async def test_slow_pages_of_one_tenant_do_not_hold_up_anothers(path: str, tmp_path: Path, drawing: Drawing) -> None:
    """Three documents of a thousand slow pages in two workers; then two pages of another tenant's."""
    mine = write_pdf(tmp_path / "x.pdf", 2, (50, 50)).read_bytes()
    async with served(tmp_path) as (service, hostile, other):
        slow = slow_pdf(1000, 10**5)
        sent = [asyncio.create_task(service.upload(slow, headers=hostile)) for _ in range(3)]
        with ending(sent):
            assert await eventually(lambda: drawing.num_slow > 10, 60)
            answer = await asyncio.wait_for(service.upload(mine, path, headers=other), 60)
            assert answer.status_code in (200, 202), answer.text
            if path == "/v1/ocr/jobs":
                job = await service.wait_for(answer.json()["id"], "completed", "failed", headers=other)
                assert (job["status"], job["pages_failed"]) == ("completed", 0)
            # It is opened once, a job too. Two pages wait at once, so the second one waits for one request more.
            assert len(drawing.waits) == 3
            assert max(drawing.waits) <= 2
            assert not any(task.done() for task in sent), "the slow documents are still being drawn"


async def test_who_has_used_up_the_allowance_waits_behind_the_others(tmp_path: Path, drawing: Drawing) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 12, (50, 50)).read_bytes()
    render = {"tenant_cpu_s_per_minute": 1.0, "workers": 1}
    async with served(tmp_path, render=render) as (service, hostile, other):
        sent = [asyncio.create_task(service.upload(slow_pdf(1000, 10**5), headers=hostile))]
        with ending(sent):
            assert await eventually(lambda: drawing.num_slow > 20, 60)
            answer = await asyncio.wait_for(service.upload(pdf, headers=other), 60)
            assert [page["status"] for page in answer.json()["pages"]] == ["completed"] * 12
            assert len(drawing.waits) == 13
            # None at all, but for what the hostile one's allowance gains meanwhile.
            assert max(drawing.waits) <= 1


async def test_a_document_that_is_too_costly_fails_with_advice_and_its_other_pages_at_once(tmp_path: Path) -> None:
    render = {"page_cpu_s": 1, "max_lost_pages": 1, "workers": 1}
    async with served(tmp_path, render=render) as (service, hostile, _):
        job = (await service.upload(slow_pdf(200, 10**7), "/v1/ocr/jobs", headers=hostile)).json()
        done = await service.wait_for(job["id"], "completed", "failed", headers=hostile)
        assert (done["status"], done["pages_done"], done["pages_failed"]) == ("completed", 200, 200)
        found = (await service.client.get(f"/v1/ocr/jobs/{job['id']}/pages?limit=1000", headers=hostile)).json()["data"]
        codes = [page["error"]["code"] for page in found]
        assert codes.count("render_timeout") == 1
        assert codes.count("document_too_costly") == 199
        assert "dpi" in next(page["error"]["message"] for page in found if page["error"]["code"] != "render_timeout")


async def statuses(service: RunningService, headers: dict[str, str]) -> list[str]:
    return [job["status"] for job in (await service.client.get("/v1/ocr/jobs", headers=headers)).json()["data"]]


@pytest.mark.parametrize("num_services", [1, 2])
async def test_the_jobs_of_one_tenant_do_not_hold_all_places(
    num_services: int, tmp_path: Path, billing: BillingSettings
) -> None:
    """Jobs that take long, first, more of them than there are places; then a short one of another tenant's."""
    long, short = (write_pdf(tmp_path / f"{n}.pdf", n, (50, 50)).read_bytes() for n in (100, 2))
    ocr = {"billing": billing, "jobs": {"running": 2, "lease_s": 60}, "pages_in_parallel": 2}
    async with (
        served(tmp_path, reads(pause_s=0.2), **ocr) as (service, hostile, other),
        contextlib.AsyncExitStack() as more,
    ):
        hosts = [service.host]
        for _ in range(num_services - 1):
            hosts.append((await more.enter_async_context(run_host(service.settings, service.router.port)))[0])
        for _ in range(6):
            assert (await service.upload(long, "/v1/ocr/jobs", headers=hostile)).status_code == 202
        runners = [host.service.runner for host in hosts]
        assert await eventually(lambda: all(runner.num_reading == 2 for runner in runners), 30)
        job = (await service.upload(short, "/v1/ocr/jobs", headers=other)).json()
        done = await service.wait_for(job["id"], "completed", "failed", headers=other)
        assert (done["status"], done["pages_done"], done["pages_failed"]) == ("completed", 2, 0)
        assert set(await statuses(service, hostile)) <= {"running", "queued"}
        for each in (await service.client.get("/v1/ocr/jobs", headers=hostile)).json()["data"]:
            await service.client.delete(f"/v1/ocr/jobs/{each['id']}", headers=hostile)


async def test_jobs_that_share_a_place_get_on_by_turns_and_read_no_page_twice(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 12, (50, 50)).read_bytes()
    ocr = {"jobs": {"running": 1, "turn_s": 0, "settle_s": 60}, "pages_in_parallel": 1}
    async with served(tmp_path, reads(pause_s=0.05), **ocr) as (service, hostile, other):
        first, second = [(await service.upload(pdf, "/v1/ocr/jobs", headers=who)).json() for who in (hostile, other)]
        await service.wait_for(second["id"], "completed", headers=other)
        done = await service.wait_for(first["id"], "completed", headers=hostile)
        assert (done["pages_done"], done["pages_failed"], len(service.engine.asked)) == (12, 0, 24)
        asked = [each.headers["x-request-id"].partition("-p")[0] for each in service.engine.asked]
    changes = sum(one != two for one, two in itertools.pairwise(asked))
    assert changes >= 4, asked


async def test_a_document_gets_no_more_time_for_being_read_in_turns(tmp_path: Path) -> None:
    """Turns of a page each, and two pages that may be lost: the pages of later turns fail at once."""
    ocr = {"jobs": {"running": 1, "turn_s": 0}, "pages_in_parallel": 1}
    render = {"page_cpu_s": 1, "max_lost_pages": 2, "workers": 1}
    pdf = write_pdf(tmp_path / "x.pdf", 60, (50, 50)).read_bytes()
    async with served(tmp_path, reads(pause_s=0.1), render=render, **ocr) as (service, hostile, other):
        slow = (await service.upload(slow_pdf(9, 10**7), "/v1/ocr/jobs", headers=hostile)).json()
        await service.upload(pdf, "/v1/ocr/jobs", headers=other)
        done = await service.wait_for(slow["id"], "completed", "failed", headers=hostile)
        found = (await service.client.get(f"/v1/ocr/jobs/{slow['id']}/pages", headers=hostile)).json()["data"]
    codes = [page["error"]["code"] for page in found]
    assert (done["status"], codes.count("render_timeout")) == ("completed", 2)
    assert codes.count("document_too_costly") == 7


class SlowUpload:
    """A client that begins to send a request and does not go on."""

    def __init__(self, host: OcrHost, path: str, headers: dict[str, str], kind: str, body: bytes) -> None:
        self._host = host
        lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-type: {kind}", "content-length: 1000000"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._text = "\r\n".join([*lines, "", ""]).encode() + body

    async def __aenter__(self) -> None:
        port = int(self._host.record.url.rpartition(":")[2])
        _, self._writer = await asyncio.open_connection("127.0.0.1", port)
        self._writer.write(self._text)
        await self._writer.drain()

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()


FORM, JSON = "multipart/form-data; boundary=x", "application/json"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/ocr", "too_many_documents"),
        ("/v1/ocr/quote", "too_many_documents"),
        ("/v1/ocr/jobs", "too_many_submissions"),
    ],
)
async def test_slow_uploads_of_one_tenant_leave_places_to_others(path: str, code: str, tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 1, (50, 50)).read_bytes()
    places: dict[str, Any] = {"max_documents": 4, "max_submissions": 4}
    async with served(tmp_path, **places) as (service, hostile, other), contextlib.AsyncExitStack() as uploads:
        inside = service.host.service
        for _ in range(4):
            await uploads.enter_async_context(SlowUpload(service.host, path, hostile, FORM, b"--x"))
        assert await eventually(lambda: inside.documents.num_held + inside.submissions.num_held == 2, 10)
        mine = await service.upload(pdf, path, headers=hostile)
        assert (mine.status_code, mine.json()["error"]["code"]) == (429, code)
        assert int(mine.headers["retry-after"]) >= 1
        assert (await service.upload(pdf, path, headers=other)).status_code in (200, 202)
        assert await eventually(lambda: inside.documents.num_held + inside.submissions.num_held == 2, 10)
        # The whole of it taken is another matter, and not this tenant's fault.
        inside.documents.add("third", 2)
        inside.submissions.add("third", 2)
        full = await service.upload(pdf, path, headers=other)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
    assert (inside.documents.num_held, inside.submissions.num_held) == (2, 2)


async def test_json_of_one_tenant_leaves_memory_to_others(tmp_path: Path) -> None:
    pdf = base64.b64encode(write_pdf(tmp_path / "x.pdf", 1, (50, 50)).read_bytes()).decode()
    body = {"model": "nano", "document": {"type": "file", "file": pdf}}
    async with served(tmp_path) as (service, hostile, other), contextlib.AsyncExitStack() as uploads:
        bodies = service.host.service.uploads.bodies
        bodies.least, bodies.total = 1000, 4000
        for _ in range(3):
            await uploads.enter_async_context(SlowUpload(service.host, "/v1/ocr", hostile, JSON, b"[" * 900))
        assert await eventually(lambda: bodies.num_held == 1800, 10)
        refused = await service.client.post("/v1/ocr", json=body, headers=hostile)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_bodies")
        assert (await service.client.post("/v1/ocr", json=body, headers=other)).status_code == 200


async def test_who_is_alone_may_have_every_place(tmp_path: Path) -> None:
    """Without keys everybody is the same tenant, which must not be kept from half of the service."""
    pdf = write_pdf(tmp_path / "x.pdf", 1, (50, 50)).read_bytes()
    async with run_service(tmp_path, max_documents=2) as service, contextlib.AsyncExitStack() as uploads:
        inside = service.host.service
        await uploads.enter_async_context(SlowUpload(service.host, "/v1/ocr", {}, FORM, b"--x"))
        assert await eventually(lambda: inside.documents.num_held == 1, 10)
        assert (await service.upload(pdf)).status_code == 200
        assert await eventually(lambda: inside.documents.num_held == 1, 10)
        await uploads.enter_async_context(SlowUpload(service.host, "/v1/ocr", {}, FORM, b"--x"))
        assert await eventually(lambda: inside.documents.num_held == 2, 10)
        assert (await service.upload(pdf)).status_code == 503
