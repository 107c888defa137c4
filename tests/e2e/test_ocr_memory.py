"""A thousand pages through the service: its memory, and that of its render workers, hardly knows of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import fpdf
import httpx
import psutil
import pytest
from support.ocr_service import BODY_BYTES, reads
from support.router_stack import Engine, Exchange, build_settings, run_router

from e2e.ocr_processes import service_process
from serving.settings.router import LimitSettings

NUM_PAGES = 1000
MAX_GROWTH_BYTES = 300 * 2**20
PARALLEL = 4


def write_book(file: Path, num_pages: int) -> bytes:
    """A4 pages full of numbers, other ones on each."""
    words = random.Random(1)
    pdf = fpdf.FPDF()
    pdf.set_font("helvetica", size=9)
    for number in range(num_pages):
        pdf.add_page()
        pdf.text(10, 10, f"Page {number + 1}")
        for line in range(50):
            pdf.text(10, 20 + 5 * line, str(words.getrandbits(250)))
    pdf.output(str(file))
    return file.read_bytes()


class Watch:
    """The most that a process and its children have had in memory together, as /proc tells it."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.peak_bytes = 0

    def look(self) -> int:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, total)
        return total

    async def look_forever(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0.05)


async def stream(client: httpx.AsyncClient, pdf: bytes, **options: str) -> list[dict[str, Any]]:
    """The events of a document, without their texts."""
    form = {"model": "nano", "stream": "true", **options}
    events = []
    async with client.stream("POST", "/v1/ocr", data=form, files={"file": ("x.pdf", pdf)}, timeout=600) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                events.append({name: event.get(name) for name in ("type", "index", "usage")})
    return events


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_a_thousand_pages_cost_no_more_memory_than_a_few(tmp_path: Path) -> None:
    pdf = write_book(tmp_path / "x.pdf", NUM_PAGES)
    settings = build_settings(limits=LimitSettings(max_body_bytes=BODY_BYTES))
    read = reads("word " * 300)

    async def read_and_forget(exchange: Exchange) -> None:
        engine.asked.clear()  # it keeps every picture otherwise
        await read(exchange)

    async with (
        Engine(read_and_forget, max_num_seqs=64) as engine,
        run_router(engine.record, settings=settings) as router,
        service_process(tmp_path, router.port) as (process, client),
    ):
        await stream(client, pdf, pages="1-8")  # the workers run, and everything is imported
        watch = Watch(process.pid)
        before_bytes = watch.look()
        watching = asyncio.create_task(watch.look_forever())
        events = await stream(client, pdf)
        watching.cancel()
    growth_bytes = watch.peak_bytes - before_bytes
    print(f"{before_bytes / 2**20:.0f} MiB before, {growth_bytes / 2**20:.0f} MiB more at the most")
    assert growth_bytes < MAX_GROWTH_BYTES
    started = [event["index"] for event in events if event["type"] == "page.started"]
    ended = [event["index"] for event in events if event["type"] == "page.completed"]
    assert sorted(started) == sorted(ended) == list(range(NUM_PAGES))
    # They begin in their order, but for those that are drawn side by side, and none waits for long.
    for order in (started, ended):
        assert max(abs(place - index) for place, index in enumerate(order)) <= 4 * PARALLEL
    assert events[-1]["usage"]["pages_processed"] == NUM_PAGES


@pytest.mark.slow
async def test_ten_thousand_pages_are_refused_before_any_is_drawn(tmp_path: Path) -> None:
    pdf = write_book(tmp_path / "x.pdf", 10 * NUM_PAGES)
    settings = build_settings(limits=LimitSettings(max_body_bytes=BODY_BYTES))
    async with (
        Engine(reads(), max_num_seqs=64) as engine,
        run_router(engine.record, settings=settings) as router,
        service_process(tmp_path, router.port) as (process, client),
    ):
        await stream(client, pdf, pages="1-8")
        watch = Watch(process.pid)
        before_bytes = watch.look()
        watching = asyncio.create_task(watch.look_forever())
        for path in ("/v1/ocr", "/v1/ocr/jobs"):
            answer = await client.post(path, data={"model": "nano"}, files={"file": ("x.pdf", pdf)})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_pages")
            assert "10000 pages and 1000" in answer.json()["error"]["message"]
        assert len(await stream(client, pdf, pages="4000,9999-10000")) > 3
        watching.cancel()
        assert len(engine.asked) == 8 + 3
    assert watch.peak_bytes - before_bytes < MAX_GROWTH_BYTES
