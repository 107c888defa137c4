"""What the service and the router count, after requests that are known: each thing once, and each tenant its own."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.ocr_service import RunningService, frame, reads, run_host, run_service, tail
from support.papers import office_file, write_pdf
from support.router_stack import Exchange, answers, eventually, streams

from serving.ocr_api.options import RESOLUTION_MODES
from unit.ocr.jobs.test_jobs import change_jobs, make_keys

PRICE = (80 * 30 + 10 * 100) / 10**9
LOOPED = streams(frame("la la", finish_reason="length", stop_reason="repetition"), tail())
REFUSED = answers(b'{"error":{"message":"no","type":"BadRequestError","code":400}}', 400)

Counts = dict[tuple[str, ...], float]


async def scrape(service: RunningService) -> dict[str, Counts]:
    """Of the service: values by the labels' values. A histogram is its number of observations."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(service.host.record.metrics_url)).text
    return read_metrics(text)


def read_metrics(text: str) -> dict[str, Counts]:
    found: dict[str, Counts] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_sum", "_created")):
                name = sample.name.removesuffix("_count")
                found.setdefault(name, {})[tuple(sample.labels.values())] = sample.value
    return found


def by_page(**scripts: Any) -> Any:
    """An engine that reads every page well but those named: `p2=...`."""

    async def script(exchange: Exchange) -> None:
        (page,) = re.findall(r"-(p\d+)-t", exchange.asked.headers["x-request-id"])
        await scripts.get(page, reads())(exchange)

    return script


def once(first: Any, then: Any) -> Any:
    left = [first]

    async def script(exchange: Exchange) -> None:
        await (left.pop() if left else then)(exchange)

    return script


async def test_every_page_retry_and_refusal_is_counted_once(tmp_path: Path) -> None:
    keys_file, (acme, other) = make_keys(tmp_path, "acme", "other")
    pdf = write_pdf(tmp_path / "x.pdf", 4, (100, 100)).read_bytes()
    # The second page loops once, in tiny; the third loops in every mode; the fourth is refused.
    script = by_page(p2=once(LOOPED, reads()), p3=LOOPED, p4=REFUSED)
    async with run_service(tmp_path, script, keys_file=keys_file) as service:
        whole = (await service.upload(pdf, mode="tiny", headers=acme)).json()
        assert [page["retries"] for page in whole["pages"]] == [0, 1, 3, 0]
        assert (await service.upload(pdf, pages="1", stream="true", headers=other)).status_code == 200
        job = (await service.upload(pdf, "/v1/ocr/jobs", pages="1,4", headers=other)).json()
        await service.wait_for(job["id"], "completed", headers=other)
        assert (await service.upload(office_file(), headers=acme)).status_code == 400
        assert (await service.upload(pdf, pages="5", headers=acme)).status_code == 400
        assert (await service.upload(pdf)).status_code == 401
        runner = service.host.service.runner
        assert await eventually(lambda: runner.counts.get("completed") == 1, 5)
        found = await scrape(service)
        routers = read_metrics(service.router.app.render_metrics().decode())
    pages = Counter(dict.fromkeys(("completed", "failed"), 0))
    for (mode, status), number in found["serving_ocr_pages_total"].items():
        assert mode in (*RESOLUTION_MODES, "none")
        pages[status] += int(number)
    assert pages == {"completed": 4, "failed": 3}
    assert found["serving_ocr_page_retries_total"] == {(): 4}
    assert found["serving_ocr_documents_total"] == {("pdf", "request"): 1, ("pdf", "stream"): 1, ("pdf", "job"): 1}
    assert found["serving_ocr_refusals_total"] == {
        ("unsupported_document",): 1,
        ("invalid_pages",): 1,
        ("invalid_api_key",): 1,
    }
    assert found["serving_ocr_render_seconds"] == {(): 7}
    assert found["serving_ocr_page_seconds"] == {(): 7}
    assert found["serving_ocr_render_queue_requests"] == {(): 0}
    assert 0 < found["serving_ocr_render_cpu_seconds_total"][()] < 60
    assert found["serving_ocr_open_documents"] == {(): 0}
    assert found["serving_ocr_jobs"][("completed",)] == 1
    assert sum(found["serving_ocr_jobs"].values()) == 1
    # What the router counts of the same, tenant by tenant: acme's pages took 1 + 2 + 4 tries, and one was refused.
    assert sums_of(routers, "acme") == (7, round(7 * PRICE, 9), 8)
    assert sums_of(routers, "other") == (2, round(2 * PRICE, 9), 3)


def sums_of(routers: dict[str, Counts], tenant: str) -> tuple[float, ...]:
    """A tenant's pages, dollars and requests."""
    names = ("serving_pages_total", "serving_cost_dollars_total", "serving_requests_total")
    return tuple(round(sum(value for labels, value in routers[name].items() if tenant in labels), 9) for name in names)


async def test_a_document_that_was_refused_as_a_whole_has_no_pages(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 9, (100, 100)).read_bytes()
    async with run_service(tmp_path) as service:
        assert (await service.upload(pdf, model="other")).status_code == 404
        assert (await service.upload(pdf, model="other", stream="true")).status_code == 404
        job = (await service.upload(pdf, "/v1/ocr/jobs", model="other")).json()
        await service.wait_for(job["id"], "failed")
        found = await scrape(service)
    assert "serving_ocr_pages_total" not in found
    assert found["serving_ocr_refusals_total"] == {("model_not_found",): 2}


async def test_two_services_that_read_one_job_count_each_page_once(tmp_path: Path) -> None:
    """Also those that the first one read and could no longer store."""
    pdf = write_pdf(tmp_path / "x.pdf", 6, (100, 100)).read_bytes()
    async with run_service(tmp_path, reads(pause_s=0.3), jobs={"lease_s": 1}, pages_in_parallel=2) as service:
        job = (await service.upload(pdf, "/v1/ocr/jobs")).json()
        assert await eventually(lambda: len(service.engine.asked) == 2, 20)
        # The lease goes to another while pages are under way, as if this process had stood still for so long.
        await change_jobs(service.settings.billing, lease_owner="gone")
        async with run_host(service.settings, service.router.port) as (host, _):
            other = RunningService(host, service.client, service.router, service.engine, service.settings)
            done = await service.wait_for(job["id"], "completed")
            counts = await asyncio.gather(scrape(service), scrape(other))
    assert (done["pages_done"], done["pages_failed"]) == (6, 0)
    pages = [found.get("serving_ocr_pages_total", {}) for found in counts]
    assert sum(number for found in pages for (_, status), number in found.items() if status == "completed") == 6
