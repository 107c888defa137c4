"""Jobs over HTTP, with a real router in front of engines that answer as a test says."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from support.ocr_service import build_service_settings, reads, run_host, run_service
from support.papers import write_pdf
from support.router_stack import answers, eventually, streams_and_waits

from serving.billing.database import Database
from serving.billing.schema import JOB_PAGES, JOBS
from serving.ocr.jobs.key_sealing import KeySealer
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.settings.billing import BillingSettings
from serving.settings.tenants import Tenant

SECRET_TEXT = "the quick brown fox is the page's secret"


def blank_pdf(folder: Path, num_pages: int) -> bytes:
    return write_pdf(folder / "blank.pdf", num_pages, (100, 100)).read_bytes()


def make_keys(folder: Path, *tenants: str) -> tuple[Path, list[dict[str, str]]]:
    """A keys file, and the header of each tenant."""
    made = [make_key(tenant, created=datetime.now(UTC)) for tenant in tenants]
    file = folder / "keys.yaml"
    write_keys(file, KeysFile(tenants={name: Tenant() for name in tenants}, keys=tuple(record for _, record in made)))
    return file, [{"authorization": f"Bearer {text}"} for text, _ in made]


async def change_jobs(settings: BillingSettings, **values: Any) -> None:
    database = Database(settings)
    async with database.engine.begin() as connection:
        await connection.execute(update(JOBS).values(values))
    await database.close()


async def rows_of(settings: BillingSettings, table: Any) -> list[Any]:
    database = Database(settings)
    async with database.reading() as connection:
        found = list(await connection.execute(select(table)))
    await database.close()
    return found


@pytest.fixture
def billing(make_settings: Any) -> BillingSettings:
    found: BillingSettings = make_settings()
    return found


async def test_a_job_in_either_database(tmp_path: Path, billing: BillingSettings) -> None:
    async with run_service(tmp_path, billing=billing) as service:
        job = (await service.upload(blank_pdf(tmp_path, 6), "/v1/ocr/jobs")).json()
        done = await service.wait_for(job["id"], "completed", "failed")
        assert (done["status"], done["pages_done"], done["error"]) == ("completed", 6, None)
        # The job has ended in the database before its document goes.
        assert await eventually(lambda: not list((tmp_path / "ocr" / "documents").iterdir()), 10)
        assert not list((tmp_path / "ocr" / "uploads").iterdir())
        assert (await rows_of(billing, JOBS))[0].sealed_key == ""


async def test_deleted_is_gone(tmp_path: Path) -> None:
    keys_file, (key,) = make_keys(tmp_path, "acme")
    async with run_service(
        tmp_path, reads(SECRET_TEXT), keys_file=keys_file, jobs={"keep_documents_s": 1e6}
    ) as service:
        billing = service.settings.billing
        pdf = blank_pdf(tmp_path, 2)
        job = (await service.upload(pdf, "/v1/ocr/jobs", headers=key)).json()
        await service.wait_for(job["id"], "completed", headers=key)
        kept = tmp_path / "ocr" / "documents" / job["id"]
        assert kept.read_bytes() == pdf
        database = tmp_path / "billing" / "ledger.db"

        def find(text: str) -> bool:
            return any(text.encode() in file.read_bytes() for file in database.parent.glob("ledger.db*"))

        assert find(SECRET_TEXT)
        assert (await service.client.delete(f"/v1/ocr/jobs/{job['id']}", headers=key)).status_code == 204
        assert (await service.client.get(f"/v1/ocr/jobs/{job['id']}", headers=key)).status_code == 404
        assert (await service.client.delete(f"/v1/ocr/jobs/{job['id']}", headers=key)).status_code == 404
        assert not kept.exists()
        assert not await rows_of(billing, JOBS)
        assert not await rows_of(billing, JOB_PAGES)
        assert not find(SECRET_TEXT), "deleted text is still in the file"


async def test_a_key_is_sealed_while_its_job_is_open(tmp_path: Path) -> None:
    keys_file, (key,) = make_keys(tmp_path, "acme")
    left = asyncio.Event()
    async with run_service(tmp_path, streams_and_waits(left), keys_file=keys_file) as service:
        job = (await service.upload(blank_pdf(tmp_path, 1), "/v1/ocr/jobs", headers=key)).json()
        (row,) = await rows_of(service.settings.billing, JOBS)
        text = key["authorization"].removeprefix("Bearer ")
        assert text not in str(row)
        assert KeySealer(None, tmp_path / "ocr").open(row.sealed_key).api_key == text
        assert (tmp_path / "ocr" / "secret").stat().st_mode & 0o777 == 0o600
        await service.wait_for(job["id"], "running", headers=key)
        assert await eventually(lambda: len(service.engine.asked) == 1, 20), "there is something to abort"
        cancelled = await service.client.post(f"/v1/ocr/jobs/{job['id']}/cancel", headers=key)
        assert cancelled.json()["status"] == "cancelled"
        (row,) = await rows_of(service.settings.billing, JOBS)
        assert row.sealed_key == ""
        await asyncio.wait_for(left.wait(), 5)
        assert not (tmp_path / "ocr" / "documents" / job["id"]).exists()


async def test_jobs_are_their_tenants(tmp_path: Path) -> None:
    keys_file, (acme, other) = make_keys(tmp_path, "acme", "other")
    async with run_service(tmp_path, keys_file=keys_file) as service:
        first = (await service.upload(blank_pdf(tmp_path, 1), "/v1/ocr/jobs", headers=acme)).json()
        second = (await service.upload(blank_pdf(tmp_path, 2), "/v1/ocr/jobs", headers=acme)).json()
        path = f"/v1/ocr/jobs/{first['id']}"
        for method, where in (("GET", path), ("DELETE", path), ("GET", path + "/pages"), ("POST", path + "/cancel")):
            answer = await service.client.request(method, where, headers=other)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
        assert (await service.client.get("/v1/ocr/jobs", headers=other)).json()["data"] == []
        listed = (await service.client.get("/v1/ocr/jobs?limit=1", headers=acme)).json()
        assert ([job["id"] for job in listed["data"]], listed["has_more"]) == ([second["id"]], True)
        rest = (await service.client.get(f"/v1/ocr/jobs?after={second['id']}", headers=acme)).json()
        assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([first["id"]], False)
        for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": "Basic x"}):
            assert (await service.client.get("/v1/ocr/jobs", headers=headers)).status_code == 401
            assert (await service.upload(blank_pdf(tmp_path, 1), headers=headers)).status_code == 401


async def test_a_repeated_submit_is_the_first_job(tmp_path: Path, billing: BillingSettings) -> None:
    async with run_service(tmp_path, billing=billing) as service:
        pdf = blank_pdf(tmp_path, 1)
        key = {"idempotency-key": "once"}
        together = await asyncio.gather(*(service.upload(pdf, "/v1/ocr/jobs", headers=key) for _ in range(4)))
        assert {answer.status_code for answer in together} == {202}
        assert len({answer.json()["id"] for answer in together}) == 1
        other = await service.upload(pdf, "/v1/ocr/jobs", headers=key, format="text")
        assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
        await service.wait_for(together[0].json()["id"], "completed")
        assert len(service.engine.asked) == 1


async def test_two_services_never_read_the_same_page(tmp_path: Path, billing: BillingSettings) -> None:
    jobs = {"lease_s": 60}  # on a busy machine a service may stand still for longer than the others' second
    async with run_service(tmp_path, reads(pause_s=0.02), billing=billing, jobs=jobs) as service:
        async with run_host(service.settings, service.router.port) as (_, _client):
            pdf = blank_pdf(tmp_path, 8)
            taken = [(await service.upload(pdf, "/v1/ocr/jobs")).json()["id"] for _ in range(5)]
            for job_id in taken:
                assert (await service.wait_for(job_id, "completed", "failed"))["pages_done"] == 8
        assert len(service.engine.asked) == 40


async def test_a_service_that_stood_still_for_a_lease_reads_its_job_once(tmp_path: Path) -> None:
    async with run_service(tmp_path, reads(pause_s=0.8), pages_in_parallel=2, jobs={"lease_s": 60}) as service:
        job = (await service.upload(blank_pdf(tmp_path, 6), "/v1/ocr/jobs")).json()
        assert await eventually(lambda: len(service.engine.asked) > 2, 20)
        await change_jobs(service.settings.billing, lease_until_ns=0)  # nobody else has taken it
        done = await service.wait_for(job["id"], "completed", "failed")
        assert (done["status"], done["pages_done"], len(service.engine.asked)) == ("completed", 6, 6)


async def test_a_job_is_seen_followed_and_cancelled_at_the_other_service(
    tmp_path: Path, billing: BillingSettings
) -> None:
    async with (
        run_service(tmp_path, reads(pause_s=0.15), billing=billing, pages_in_parallel=1) as service,
        run_host(service.settings, service.router.port) as (host, other),
    ):
        await host.service.runner.close(0)  # the other one reads nothing itself
        job = (await service.upload(blank_pdf(tmp_path, 40), "/v1/ocr/jobs")).json()
        path = f"/v1/ocr/jobs/{job['id']}"
        seen: list[int] = []
        async with asyncio.timeout(20):
            while len(seen) < 3:
                found = (await other.get(f"{path}/pages?after={len(seen)}")).json()["data"]
                seen.extend(page["seq"] for page in found)
                await asyncio.sleep(0.02)
        assert seen == list(range(1, len(seen) + 1))
        assert [each["id"] for each in (await other.get("/v1/ocr/jobs")).json()["data"]] == [job["id"]]
        cancelled = (await other.post(f"{path}/cancel")).json()
        assert (cancelled["status"], (await service.client.get(path)).json()["status"]) == ("cancelled",) * 2
        # Who reads it learns of it with the next page or a third of its lease later, and asks no more.
        runner = service.host.service.runner
        assert await eventually(lambda: runner.num_reading == 0, 5)
        num_asked = len(service.engine.asked)
        await asyncio.sleep(0.4)
        assert len(service.engine.asked) == num_asked < 40
        done = (await other.get(path)).json()
        assert done["pages_done"] == len((await other.get(f"{path}/pages")).json()["data"])
        assert (await other.delete(path)).status_code == 204
        assert (await service.client.get(path)).status_code == 404


async def test_a_service_that_stops_leaves_its_job_to_the_next(tmp_path: Path) -> None:
    settings = build_service_settings(tmp_path, pages_in_parallel=2, jobs={"lease_s": 600})
    async with run_service(tmp_path, reads(pause_s=0.1), settings=settings) as service:
        assert (await service.client.get("/v1/ocr/jobs")).status_code == 200, "the database is there"
        async with run_host(settings, service.router.port, drain_s=5) as (_, client):
            await service.host.service.runner.close(0)  # only the other one reads
            form = {"model": "nano"}
            answer = await client.post("/v1/ocr/jobs", data=form, files={"file": ("x", blank_pdf(tmp_path, 12))})
            job_id = answer.json()["id"]
            assert await eventually(lambda: len(service.engine.asked) > 4, 20)
        num_asked = len(service.engine.asked)
        assert num_asked < 12
        async with run_host(settings, service.router.port):
            job = await service.wait_for(job_id, "completed")
        assert (job["pages_done"], len(service.engine.asked)) == (12, 12)


async def test_a_job_whose_document_is_gone_fails(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        await service.host.service.runner.close(0)  # the next service reads it
        job = (await service.upload(blank_pdf(tmp_path, 2), "/v1/ocr/jobs")).json()
        (tmp_path / "ocr" / "documents" / job["id"]).unlink()
        async with run_host(service.settings, service.router.port):
            done = await service.wait_for(job["id"], "completed", "failed")
    assert (done["status"], done["error"]["code"], done["pages_done"]) == ("failed", "document_missing", 0)


async def test_what_the_router_refuses_for_all_pages_ends_the_job(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        job = (await service.upload(blank_pdf(tmp_path, 9), "/v1/ocr/jobs", model="other")).json()
        done = await service.wait_for(job["id"], "completed", "failed")
        assert (done["status"], done["error"]["code"], done["pages_done"]) == ("failed", "model_not_found", 0)


async def test_a_page_that_fails_is_reported_with_the_others(tmp_path: Path) -> None:
    refusal = b'{"error":{"message":"no","type":"BadRequestError","code":400}}'
    async with run_service(tmp_path, answers(refusal, 400)) as service:
        job = (await service.upload(blank_pdf(tmp_path, 2), "/v1/ocr/jobs")).json()
        done = await service.wait_for(job["id"], "completed", "failed")
        assert (done["status"], done["pages_done"], done["pages_failed"]) == ("completed", 2, 2)


async def test_old_jobs_are_swept(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        job = (await service.upload(blank_pdf(tmp_path, 1), "/v1/ocr/jobs")).json()
        await service.wait_for(job["id"], "completed")
        await change_jobs(service.settings.billing, expires_ns=1)
        await service.host.service.sweeper.sweep()
        assert (await service.client.get(f"/v1/ocr/jobs/{job['id']}")).status_code == 404


async def test_too_many_open_jobs_are_refused(tmp_path: Path) -> None:
    left = asyncio.Event()
    async with run_service(tmp_path, streams_and_waits(left), jobs={"max_open_per_tenant": 2}) as service:
        found = [await service.upload(blank_pdf(tmp_path, 1), "/v1/ocr/jobs") for _ in range(3)]
        assert [answer.status_code for answer in found] == [202, 202, 429]
        assert found[2].json()["error"]["code"] == "too_many_jobs"
        assert "retry-after" in found[2].headers
        for answer in found[:2]:
            await service.client.delete(f"/v1/ocr/jobs/{answer.json()['id']}")


async def test_without_the_database_documents_are_still_read(tmp_path: Path) -> None:
    billing = BillingSettings.model_validate(
        {"directory": tmp_path, "database_url": "postgresql://nobody@127.0.0.1:1/none"}
    )
    async with run_service(tmp_path, billing=billing) as service:
        assert (await service.upload(blank_pdf(tmp_path, 1))).status_code == 200
        answer = await service.upload(blank_pdf(tmp_path, 1), "/v1/ocr/jobs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert not list((tmp_path / "ocr" / "documents").iterdir())
