"""A killed OCR service loses nothing that was read: `kill -9` in the middle of a job, and a new one that goes on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from unit.ocr.papers import write_pdf
from unit.ocr.service import BODY_BYTES, reads
from unit.router.stack import Engine, build_settings, run_router

from e2e.conftest import ROOT, free_port
from serving.router_settings import LimitSettings

SERVING = ROOT / ".venv/bin/serving"
NUM_PAGES = 50
WITHIN_S = 120


@contextlib.asynccontextmanager
async def service_process(folder: Path, router_port: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """The command that a user types, and a client of it."""
    port = free_port()
    settings = {
        "models": {"nano": {"checkpoint": "nano"}},
        "billing": {"directory": str(folder / "billing")},
        "ocr": {
            "directory": str(folder / "ocr"),
            "pages_in_parallel": 4,
            "jobs": {"lease_s": 2, "poll_s": 0.2},
        },
        "engine": {"drain_s": 5},
    }
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    address = f"http://127.0.0.1:{router_port}"
    arguments = ("ocr-service", "--config", str(config), "--router", address, "--port", str(port))
    with (folder / "service.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(SERVING, *arguments, cwd=ROOT, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            await until_up(process, client, folder)
            yield process, client
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)


async def until_up(process: asyncio.subprocess.Process, client: httpx.AsyncClient, folder: Path) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            assert process.returncode is None, (folder / "service.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/health")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


async def wait_for_job(client: httpx.AsyncClient, job_id: str, num_done: int) -> dict[str, Any]:
    async with asyncio.timeout(WITHIN_S):
        while True:
            job: dict[str, Any] = (await client.get(f"/v1/ocr/jobs/{job_id}")).json()
            if job["pages_done"] >= num_done and (num_done < NUM_PAGES or job["status"] == "completed"):
                return job
            await asyncio.sleep(0.05)


async def read_pages(client: httpx.AsyncClient, job_id: str) -> dict[int, dict[str, Any]]:
    found = (await client.get(f"/v1/ocr/jobs/{job_id}/pages?limit=1000")).json()["data"]
    return {page["number"]: page for page in found}


def count_asked(engine: Engine) -> Counter[int]:
    """How often each page was asked for, by the ids that the router passes on."""
    found = (re.search(r"-p(\d+)-t1\.", asked.headers["x-request-id"]) for asked in engine.asked)
    return Counter(int(match[1]) for match in found if match)


async def test_a_killed_service_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", NUM_PAGES, (100, 100)).read_bytes()
    settings = build_settings(limits=LimitSettings(max_body_bytes=BODY_BYTES))
    async with (
        Engine(reads("Hello page", pause_s=0.3), max_num_seqs=64) as engine,
        run_router(engine.record, settings=settings) as router,
    ):
        async with service_process(tmp_path, router.port) as (process, client):
            form = {"model": "nano", "mode": "tiny", "format": "text"}
            answer = await client.post("/v1/ocr/jobs", data=form, files={"file": ("x.pdf", pdf)})
            job_id = answer.json()["id"]
            await wait_for_job(client, job_id, 15)
            before = await read_pages(client, job_id)
            process.kill()
            await process.wait()
        asked_before = count_asked(engine)
        async with service_process(tmp_path, router.port) as (_, client):
            job = await wait_for_job(client, job_id, NUM_PAGES)
            after = await read_pages(client, job_id)
        asked = count_asked(engine)
    assert 15 <= len(before) < NUM_PAGES
    assert (job["pages_done"], job["pages_failed"]) == (NUM_PAGES, 0)
    assert sorted(after) == list(range(1, NUM_PAGES + 1))
    assert all(page["text"] == "Hello page" for page in after.values())
    assert {number: after[number] for number in before} == before
    # What was stored was asked for once; only what was in flight, four pages at most, was asked for again.
    assert all(asked[number] == 1 for number in before)
    again = [number for number, times in asked.items() if times > 1]
    assert len(again) <= 4
    assert all(asked[number] == 2 and asked_before[number] == 1 for number in again)
    # Each page is counted once in what the job has cost.
    assert job["usage"]["completion_tokens"] == 10 * NUM_PAGES
    assert job["usage"]["estimated_cost"] == round(sum(p["usage"]["estimated_cost"] for p in after.values()), 9)
