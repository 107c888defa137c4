"""OCR services as processes of their own, beside a router in the test's."""

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
from support.router_stack import Engine

from e2e.conftest import ROOT, free_port

SERVING = ROOT / ".venv/bin/serving"
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
            "jobs": {"lease_s": 2, "poll_s": 0.2, "settle_s": 1},
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
            if job["pages_done"] >= num_done and (num_done < job["pages_total"] or job["status"] == "completed"):
                return job
            await asyncio.sleep(0.05)


async def read_pages(client: httpx.AsyncClient, job_id: str) -> dict[int, dict[str, Any]]:
    found = (await client.get(f"/v1/ocr/jobs/{job_id}/pages?limit=1000")).json()["data"]
    return {page["number"]: page for page in found}


def count_asked(engine: Engine) -> Counter[int]:
    """How often each page was asked for, by the ids that the router passes on."""
    found = (re.search(r"-p(\d+)-t1\.", asked.headers["x-request-id"]) for asked in engine.asked)
    return Counter(int(match[1]) for match in found if match)
