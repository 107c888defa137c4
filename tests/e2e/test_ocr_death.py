"""A killed OCR service loses nothing that was read: `kill -9` in the middle of a job, and a new one that goes on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from pathlib import Path

import orjson
import psutil
from support.ocr_service import BODY_BYTES, frame, reads, tail
from support.papers import write_pdf
from support.router_stack import Engine, Exchange, answers, build_settings, eventually, run_router

from e2e.ocr_processes import WITHIN_S, count_asked, read_pages, service_process, wait_for_job
from serving.settings.billing import BillingSettings
from serving.settings.ocr import OcrSettings
from serving.settings.router import LimitSettings
from serving.settings.stack import Settings

NUM_PAGES = 50
NUM_UNSTORED = 6
"""Pages that may have been read and not stored when a service with four readers dies."""


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
    # What was stored was asked for once. Asked for again was only what was not: a page in the hands of each of the four
    # readers, one that waited to be stored, and one that was being stored.
    assert all(asked[number] == 1 for number in before)
    again = [number for number, times in asked.items() if times > 1]
    assert len(again) <= NUM_UNSTORED
    assert all(asked[number] == 2 and asked_before[number] == 1 for number in again)
    # Each page is counted once in what the job has cost.
    assert job["usage"]["completion_tokens"] == 10 * NUM_PAGES
    assert job["usage"]["estimated_cost"] == round(sum(p["usage"]["estimated_cost"] for p in after.values()), 9)


async def test_the_other_of_two_services_takes_over(tmp_path: Path) -> None:
    """Two services on one database: what one takes in, either may read, and the other one when that is killed."""
    pdf = write_pdf(tmp_path / "x.pdf", NUM_PAGES, (100, 100)).read_bytes()
    async with (
        Engine(reads("Hello page", pause_s=0.3), max_num_seqs=64) as engine,
        run_router(engine.record, settings=build_stack_settings(tmp_path), has_ledger=True) as router,
        service_process(tmp_path, router.port) as one,
        service_process(tmp_path, router.port) as two,
    ):
        form = {"model": "nano", "mode": "tiny", "format": "text"}
        job_id = (await one[1].post("/v1/ocr/jobs", data=form, files={"file": ("x.pdf", pdf)})).json()["id"]
        await wait_for_job(two[1], job_id, 15)
        reading = {service for service in (one, two) if asks(service[0].pid, router.port)}
        assert len(reading) == 1, "a job is one service's"
        (reader,) = reading
        before = await read_pages(one[1], job_id)
        reader[0].kill()
        await reader[0].wait()
        left = two if reader is one else one
        job = await wait_for_job(left[1], job_id, NUM_PAGES)
        after = await read_pages(left[1], job_id)
        asked = count_asked(engine)
        ledger = router.app.accounts.ledger
        assert ledger is not None
        assert await ledger.flush(10)
        charged = sum(row[2] for row in read_ledger(tmp_path))
    assert (job["pages_done"], job["pages_failed"]) == (NUM_PAGES, 0)
    assert {number: after[number] for number in before} == before
    assert all(asked[number] == 1 for number in before)
    assert sum(times > 1 for times in asked.values()) <= NUM_UNSTORED
    assert job["usage"]["estimated_cost"] == charged / 10**9


def asks(pid: int, router_port: int) -> bool:
    """Whether a process has requests under way."""
    connections = psutil.Process(pid).net_connections("tcp")
    return sum(bool(each.raddr) and each.raddr.port == router_port for each in connections) > 1


PROMPT, WHOLE, PART = 80, 10, 4
"""Tokens of a page: its prompt, its answer, and as much of its answer as was generated when a service was killed."""


class Gate:
    """An engine whose answers wait for their ends; the third page's never comes to it the first time."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.num_waiting = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._was_asked = False

    async def answer(self, exchange: Exchange) -> None:
        if exchange.asked.path.startswith("/usage/"):
            told = {"prompt_tokens": PROMPT, "image_tokens": 73, "cached_tokens": 0, "completion_tokens": PART}
            await answers(orjson.dumps({**told, "is_finished": True}))(exchange)
            return
        is_broken_off = "-p3-" in exchange.asked.headers["x-request-id"] and not self._was_asked
        self._was_asked = self._was_asked or is_broken_off
        self.prompt_tokens += PROMPT
        self.completion_tokens += PART if is_broken_off else WHOLE
        await exchange.start()
        await exchange.chunk(frame("Hello "))
        self.num_waiting += 1
        if is_broken_off:
            await exchange.wait_until_left()
            return
        await self.opened.wait()
        await exchange.chunk(frame("page", finish_reason="stop"))
        await exchange.chunk(tail(PROMPT, WHOLE))
        await exchange.end()


def build_stack_settings(folder: Path) -> Settings:
    """A router that keeps its books where the service keeps its jobs, and knows its secret."""
    return build_settings(limits=LimitSettings(max_body_bytes=BODY_BYTES)).model_copy(
        update={
            "billing": BillingSettings(directory=folder / "billing", flush_s=0.1),
            "ocr": OcrSettings(directory=folder / "ocr"),
        }
    )


def read_ledger(folder: Path) -> list[tuple[int, str, int, int, int, int]]:
    """Of every request for a page: the page, its outcome, cost and credit, tokens of the prompt and the answer."""
    with contextlib.closing(sqlite3.connect(folder / "billing" / "ledger.db")) as books:
        found = books.execute(
            "SELECT request_id, outcome, cost_nanodollars, credit_nanodollars, prompt_tokens, completion_tokens "
            "FROM requests ORDER BY arrived_ns"
        ).fetchall()
    return sorted(((int(re.findall(r"-p(\d+)-t1", row[0])[0]), *row[1:]) for row in found), key=lambda row: row[0])


async def test_a_page_that_was_read_and_not_stored_is_paid_once(tmp_path: Path) -> None:
    """Killed at the one moment: the ledger has the answers of two pages, and the job has none of them yet."""
    pdf = write_pdf(tmp_path / "x.pdf", 3, (100, 100)).read_bytes()
    gate = Gate()
    async with (
        Engine(gate.answer, max_num_seqs=64, answers_usage=True) as engine,
        run_router(engine.record, settings=build_stack_settings(tmp_path), has_ledger=True) as router,
    ):
        ledger = router.app.accounts.ledger
        assert ledger is not None
        async with service_process(tmp_path, router.port) as (process, client):
            form = {"model": "nano", "mode": "tiny", "format": "text"}
            job_id = (await client.post("/v1/ocr/jobs", data=form, files={"file": ("x.pdf", pdf)})).json()["id"]
            assert await eventually(lambda: gate.num_waiting == 3, WITHIN_S)
            with contextlib.closing(sqlite3.connect(tmp_path / "billing" / "ledger.db", isolation_level=None)) as books:
                books.execute("BEGIN IMMEDIATE")  # nobody else can store anything now
                gate.opened.set()
                assert await eventually(lambda: ledger.counts.num_recorded == 2, WITHIN_S)
                await asyncio.sleep(0.3)  # the service has the answers in its hands
                process.kill()
                await process.wait()
                assert books.execute("SELECT num_done FROM ocr_jobs").fetchall() == [(0,)]
                books.execute("ROLLBACK")
        assert await eventually(lambda: ledger.counts.num_committed == 3, WITHIN_S)
        async with service_process(tmp_path, router.port) as (_, client):
            job = await wait_for_job(client, job_id, 3)
            pages = await read_pages(client, job_id)
        assert await ledger.flush(10)
        rows = read_ledger(tmp_path)
    whole, part = PROMPT * 30 + WHOLE * 100, PROMPT * 30 + PART * 100
    assert rows == [
        (1, "completed", whole, 0, PROMPT, WHOLE),
        (1, "completed", 0, whole, PROMPT, WHOLE),
        (2, "completed", whole, 0, PROMPT, WHOLE),
        (2, "completed", 0, whole, PROMPT, WHOLE),
        (3, "aborted", part, 0, PROMPT, PART),
        (3, "completed", whole - part, part, PROMPT, WHOLE),
    ]
    # What the engine counted is in the ledger to the token, and what was charged is what the job says.
    assert (sum(row[4] for row in rows), sum(row[5] for row in rows)) == (gate.prompt_tokens, gate.completion_tokens)
    assert (job["pages_done"], job["pages_failed"]) == (3, 0)
    assert job["usage"]["estimated_cost"] == sum(row[2] for row in rows) / 10**9 == 3 * whole / 10**9
    assert {page["usage"]["estimated_cost"] for page in pages.values()} == {whole / 10**9}
    assert job["usage"]["completion_tokens"] == 3 * WHOLE
