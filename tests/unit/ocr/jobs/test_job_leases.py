"""What a service that takes a job over learns of it, in either database."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from sqlalchemy import insert, text
from support.billing_samples import make_record
from support.router_stack import USAGE, Engine, answers, build_settings, chat_body, run_router

from serving.billing.credits import CREDIT_HEADER, CreditSigner
from serving.billing.database import Database
from serving.billing.schema import JOB_PAGES
from serving.ocr.jobs.database import JobDatabase
from serving.ocr.jobs.leases import JobLeases, LeaseLostError
from serving.ocr.jobs.model import JobRow, NewJob, find_page
from serving.ocr.jobs.store import JobStore
from serving.ocr.jobs.turns import JobTurns, OwnerJobs
from serving.ocr.reading.pages import PageUsage
from serving.ocr.reading.results import PageResult
from serving.ocr_api.shapes import DocumentFacts, JobPages, OcrPage
from serving.settings.billing import BillingSettings
from serving.settings.ocr import OcrSettings
from unit.ocr.api.test_wire import ANSWERS

NEW = NewJob("acme", "nano", {"model": "nano"}, DocumentFacts(), range(12), "", "digest")
PAGE = PageResult(OcrPage(index=0, number=1, status="completed", markdown="x"), PageUsage(), None)


async def submit(jobs: JobDatabase, job_id: str, owner: str = "acme") -> JobRow:
    return await JobStore(jobs, 10).add(job_id, dataclasses.replace(NEW, owner=owner))


@pytest.fixture
def jobs(database: Database) -> JobDatabase:
    return JobDatabase(database, 60.0)


async def test_what_pages_were_charged_is_in_the_ledger(jobs: JobDatabase, database: Database) -> None:
    job = await submit(jobs, "job-a_b")

    def row(request_id: str, cost: int, **changes: Any) -> Any:
        changes = {"arrived_ns": time.time_ns(), **changes}
        return make_record(request_id=request_id, cost_nanodollars=cost, **changes)

    await database.insert(
        [
            row("~job-a_b-p1-t1.0a", 100),
            row("~job-a_b-p1-t2.0b", 20),
            row("~job-a_b-p1-t1.0c", 3),
            row("~job-a_b-p11-t1.0d", 7),
            row("~job-a_b-p2-t1.0e", 0),
            row("~job-axb-p1-t1.0f", 9000),
            row("~job-a_b-p1-t1.10", 9000, tenant_id="other"),
            row("~job-a_b-p1-t1.11", 9000, arrived_ns=job.created_ns - 10**12),
            row("~job-a_b-pages", 9000),
            row("job-a_b-p1-t1.12", 9000),  # a client's own, which calls it so
        ]
    )
    assert await JobLeases(jobs, 5.0, "service").read_charged(job) == {0: 123, 10: 7}


async def test_a_lease_is_one_services(jobs: JobDatabase) -> None:
    job = await submit(jobs, "job-1")
    mine, others = JobLeases(jobs, 1.0, "mine"), JobLeases(jobs, 60.0, "other")
    taken = await mine.take(JobTurns(60.0))
    assert taken is not None
    assert (taken.job_id, taken.num_takes, await others.take(JobTurns(60.0))) == (job.job_id, 1, None)
    while (again := await others.take(JobTurns(60.0))) is None:
        pass
    assert again.num_takes == 2
    for write in (mine.renew(job.job_id), mine.store_page(job.job_id, PAGE), mine.finish(job.job_id)):
        with pytest.raises(LeaseLostError):
            await write
    await mine.leave(job.job_id, is_orderly=False)
    await others.store_page(job.job_id, PAGE)
    assert await others.read_done(job.job_id) == {0}


async def test_jobs_are_taken_by_turns_between_tenants(jobs: JobDatabase) -> None:
    for number in range(4):
        await submit(jobs, f"job-a{number}", "acme")
    for number in range(2):
        await submit(jobs, f"job-b{number}", "other")
    first, second, turns = JobLeases(jobs, 60.0, "first"), JobLeases(jobs, 60.0, "second"), JobTurns(60.0)
    taken = [await service.take(turns) for service in (first, second, first, second, first)]
    assert [job.job_id for job in taken if job is not None] == ["job-a0", "job-b0", "job-a1", "job-b1", "job-a2"]
    found = {each.owner: (each.num_running, each.num_free) for each in await first.survey()}
    assert found == {"acme": (3, 1), "other": (2, 0)}


async def test_what_is_held_here_is_being_read(jobs: JobDatabase) -> None:
    job = await submit(jobs, "job-1")
    leases = JobLeases(jobs, 60.0, "service")
    assert await leases.survey() == [OwnerJobs("acme", 0, 1, job.created_ns)]
    assert await leases.survey(["job-1"]) == [OwnerJobs("acme", 1, 0, 0)]
    assert await leases.take(JobTurns(60.0), ["job-1"]) is None


async def test_a_turn_that_ended_in_order_is_no_take(jobs: JobDatabase) -> None:
    """So that whoever goes on with the job need not ask what its pages were charged."""
    await submit(jobs, "job-1")
    leases, takes = JobLeases(jobs, 60.0, "service"), []
    for is_orderly in (True, True, False, True, True):
        job = await leases.take(JobTurns(60.0))
        assert job is not None
        takes.append(job.num_takes)
        await leases.leave("job-1", is_orderly=is_orderly)
    assert takes == [1, 1, 1, 2, 2]


async def test_results_are_counted_also_those_of_a_version_before(
    jobs: JobDatabase,
    database: Database,
) -> None:
    leases = JobLeases(jobs, 60.0, "service")
    for job_id in ("job-1", "job-2"):
        await submit(jobs, job_id)
    job = await leases.take(JobTurns(60.0))
    assert job is not None
    pages = [OcrPage(index=index, number=index + 1, status="completed", text="ü" * 100) for index in range(3)]
    for page in pages:
        await leases.store_page(job.job_id, dataclasses.replace(PAGE, page=page))

    async def sizes() -> dict[str, int]:
        async with database.reading() as connection:
            rows = await connection.execute(text("SELECT job_id, result_bytes FROM ocr_jobs"))
            return {job_id: int(size) for job_id, size in rows}

    num_bytes = sum(len(page.to_json()) for page in pages)
    assert await sizes() == {"job-1": num_bytes, "job-2": 0}
    async with database.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE ocr_jobs DROP COLUMN result_bytes"))
        await connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    await database.migrate()
    found = await sizes()
    assert found["job-2"] == 0
    assert num_bytes - 300 <= found["job-1"] <= num_bytes, "in characters"


async def test_pages_that_a_former_version_stored_are_listed_as_it_listed_them(
    jobs: JobDatabase,
    database: Database,
) -> None:
    await submit(jobs, "job-1")
    former = orjson.loads(orjson.loads(ANSWERS.read_text())["pages"])
    for page in former["data"]:
        row = {"job_id": "job-1", "page": page["index"], "seq": page["seq"], "is_failed": page["error"] is not None}
        stored = orjson.dumps({name: value for name, value in page.items() if name != "seq"}).decode()
        async with jobs.writing() as connection:
            await connection.execute(insert(JOB_PAGES).values(**row, result=stored, finished_ns=1))
    pages, has_more = await JobStore(jobs, 10).list_pages("job-1", "acme", 10, 0)
    assert JobPages(data=tuple(pages), has_more=has_more).to_json() == orjson.dumps(former)


@pytest.mark.parametrize(
    ("request_id", "page"),
    [
        ("~job-1-p3-t1.ab", 2),
        ("~job-1-p30-t12.0f", 29),
        ("~job-12-p3-t1.ab", None),
        ("~job-1-p-t1.ab", None),
        ("~x-p3-t1.ab", None),
        ("job-1-p3-t1.ab", None),
    ],
)
def test_a_request_names_its_page(request_id: str, page: int | None) -> None:
    assert find_page("job-1", request_id) == page


@pytest.mark.parametrize(("is_service", "charged"), [(False, {}), (True, {0: 80_000})])
async def test_a_tenants_own_chats_are_no_tries_of_its_pages(
    tmp_path: Path, is_service: bool, charged: dict[int, int]
) -> None:
    """A tenant knows its job's id, and may call its chats by it. What they cost must not come off its pages."""
    secret = SecretStr("shared")
    settings = build_settings().model_copy(
        update={
            "billing": BillingSettings(directory=tmp_path, flush_s=0.05),
            "ocr": OcrSettings(secret=secret, directory=tmp_path),
        }
    )
    own = Database(settings.billing)
    jobs = JobDatabase(own, 60.0)
    job = await JobStore(jobs, 10).add("job-1", dataclasses.replace(NEW, owner="anonymous"))
    request_id = "job-1-p1-t1"
    signer = CreditSigner(b"shared" if is_service else b"guessed")
    headers = {"x-request-id": request_id, CREDIT_HEADER: signer.sign(request_id, 0)}
    answer = orjson.dumps({"choices": [{"message": {"content": "a"}}], "usage": USAGE})
    async with (
        Engine(answers(answer)) as engine,
        run_router(engine.record, settings=settings, has_ledger=True) as router,
    ):
        asked = await router.client.post("/v1/chat/completions", content=chat_body(), headers=headers)
        assert (asked.status_code, asked.headers["x-request-id"]) == (200, request_id)
        ledger = router.app.accounts.ledger
        assert ledger is not None
        assert await ledger.flush(20)
        assert await JobLeases(jobs, 5.0, "service").read_charged(job) == charged
    await own.close()
