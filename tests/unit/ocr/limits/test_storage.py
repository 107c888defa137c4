"""What documents and results take, and what happens when it is too much: who is refused, and that nothing is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.ocr_service import RunningService, build_service_settings, reads, run_host, run_service
from support.papers import write_pdf
from support.router_stack import eventually

from serving.errors import OverloadedError, RateLimitError, ServingError
from serving.ocr.limits.storage import Storage, refusing_full_disk
from serving.settings.ocr import OcrSettings
from unit.ocr.api.test_metrics import scrape
from unit.ocr.jobs.test_jobs import make_keys

KIB = 1024


@dataclass(frozen=True)
class Holder:
    owner: str
    is_one_of_many: bool = True


ACME, OTHER = Holder("acme"), Holder("other")


def build_storage(folder: Path, **ocr: Any) -> Storage:
    storage = Storage(
        OcrSettings.model_validate(
            {"directory": folder, "max_stored_bytes": 100 * KIB, "max_document_bytes": 10 * KIB, **ocr}
        )
    )
    storage.make_folders()
    return storage


async def find_owners(job_ids: Collection[str]) -> Mapping[str, str]:
    return {job_id: "acme" for job_id in job_ids if job_id.startswith("job-")}


def room(storage: Storage, holder: Holder, num_bytes: int) -> str:
    try:
        storage.check_documents(holder, num_bytes)
    except ServingError as error:
        return f"{error.http_status} {error.code}"
    return ""


async def test_a_document_is_counted_while_it_comes_lies_and_goes(tmp_path: Path) -> None:
    storage = build_storage(tmp_path)
    job = storage.documents / "job-1"
    async with storage.receiving(ACME) as file:
        await file.write(bytes(5 * KIB))
        await file.close()
        assert storage.num_document_bytes == 5 * KIB
    assert (storage.num_document_bytes, list(storage.uploads.iterdir())) == (0, [])
    async with storage.receiving(ACME) as file:
        await file.write(bytes(6 * KIB))
        await file.close()
        await storage.move(file.path, job)
    assert (storage.num_document_bytes, job.stat().st_size) == (6 * KIB, 6 * KIB)
    await storage.look(find_owners)
    assert storage.num_document_bytes == 6 * KIB
    await storage.remove(job)
    await storage.remove(job)
    assert (storage.num_document_bytes, job.exists()) == (0, False)


async def test_what_lies_there_from_before_and_from_others_counts(tmp_path: Path) -> None:
    storage = build_storage(tmp_path)
    (storage.uploads / "broken").write_bytes(bytes(10 * KIB))
    (storage.documents / "job-1").write_bytes(bytes(40 * KIB))
    (storage.documents / "unknown").write_bytes(bytes(10 * KIB))
    await storage.look(find_owners)
    assert storage.used_ratios["documents"] == 0.6
    assert room(storage, ACME, 1) == "429 tenant_storage_full"  # half of what others leave, 80 KiB
    assert room(storage, OTHER, 20 * KIB) == ""
    # Another service has read the job, and takes something in.
    (storage.documents / "job-1").unlink()
    (storage.uploads / "growing").write_bytes(bytes(70 * KIB))
    await storage.look(find_owners)
    assert storage.used_ratios["documents"] == 0.9
    (storage.uploads / "growing").write_bytes(bytes(85 * KIB))
    await storage.look(find_owners)
    assert room(storage, OTHER, 1) == "503 storage_full"


async def test_what_is_being_written_is_counted_once(tmp_path: Path) -> None:
    storage = build_storage(tmp_path)
    async with storage.receiving(ACME) as file:
        await file.write(bytes(10 * KIB))  # some of it may still be in memory
        await storage.look(find_owners)
        assert storage.num_document_bytes == 10 * KIB
        with pytest.raises(RateLimitError):
            await file.write(bytes(45 * KIB))
        await file.write(bytes(30 * KIB))
        await file.close()
        await storage.look(find_owners)
        assert storage.num_document_bytes == 40 * KIB


async def test_an_owner_is_found_when_the_database_is_there_again(tmp_path: Path) -> None:
    storage = build_storage(tmp_path)
    (storage.documents / "job-1").write_bytes(bytes(50 * KIB))

    async def find_none(job_ids: Collection[str]) -> Mapping[str, str]:
        return {}

    await storage.look(find_none)
    assert room(storage, ACME, 20 * KIB) == ""
    await storage.look(find_owners)
    assert (room(storage, ACME, 20 * KIB), storage.num_document_bytes) == ("429 tenant_storage_full", 50 * KIB)


def test_other_faults_of_the_disk_are_no_lack_of_room() -> None:
    with pytest.raises(PermissionError), refusing_full_disk():
        raise PermissionError(13, "x")
    with pytest.raises(OverloadedError), refusing_full_disk():
        raise OSError(28, "x")


@pytest.mark.parametrize("path", ["/v1/ocr", "/v1/ocr/quote", "/v1/ocr/jobs"])
async def test_a_full_disk_refuses_uploads_and_is_no_failure(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 1, (50, 50)).read_bytes()

    def make_full(dir: Path) -> tuple[int, str]:  # noqa: A002  the name that it is called by
        return os.open("/dev/full", os.O_WRONLY), str(dir / "full")

    async with run_service(tmp_path) as service:
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "mkstemp", make_full)
            for data in (pdf, pdf + bytes(300_000)):  # in the buffer to the end, and beyond it
                answer = await service.upload(data, path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full"), answer.text
                assert "retry-after" in answer.headers
        assert (await service.upload(pdf, path)).status_code in (200, 202)
        assert await eventually(lambda: service.host.service.documents.num_held == 0, 5)


def padded_pdf(folder: Path, size_bytes: int) -> bytes:
    data = write_pdf(folder / "x.pdf", 1, (50, 50)).read_bytes()
    return data + b"\n" * (size_bytes - len(data))


async def submit(service: RunningService, data: bytes, key: dict[str, str]) -> tuple[int, str]:
    """Status, and the job's id or the error's code."""
    answer = await service.upload(data, "/v1/ocr/jobs", headers=key)
    found = answer.json()
    return answer.status_code, found["id"] if answer.status_code == 202 else found["error"]["code"]


async def test_documents_of_one_tenant_do_not_fill_the_disk(tmp_path: Path) -> None:
    """Neither those of jobs that wait, nor those of an earlier run; and what was taken in is read to its end."""
    keys_file, (acme, other) = make_keys(tmp_path, "acme", "other")
    bounds: dict[str, Any] = {"max_stored_bytes": 80 * KIB, "max_document_bytes": 10 * KIB}
    settings = build_service_settings(tmp_path, **bounds)
    data = padded_pdf(tmp_path, 10 * KIB)
    async with run_service(tmp_path, reads(), settings=settings, keys_file=keys_file) as service:
        await service.host.service.runner.close(0)  # jobs wait
        mine = [await submit(service, data, acme) for _ in range(6)]
        assert [status for status, _ in mine] == [202] * 4 + [429] * 2
        assert mine[5][1] == "tenant_storage_full"
        theirs = [await submit(service, data, other) for _ in range(2)]
        assert [status for status, _ in theirs] == [202, 202]
        assert (await service.upload(data, headers=other)).json()["error"]["code"] == "tenant_storage_full"
        async with run_host(settings, service.router.port) as (host, client):
            after = RunningService(host, client, service.router, service.engine, settings)
            # The next service finds them, and reads them while it refuses more.
            storage = host.service.storage
            keys = {job_id: acme for _, job_id in mine[:4]} | {job_id: other for _, job_id in theirs}
            for job_id, key in keys.items():
                assert (await after.wait_for(job_id, "completed", "failed", headers=key))["pages_failed"] == 0
            assert await eventually(lambda: storage.num_document_bytes == 0, 10)
            assert (await submit(after, data, acme))[0] == 202


async def test_all_documents_together_have_a_bound(tmp_path: Path) -> None:
    keys_file, (acme,) = make_keys(tmp_path, "acme")
    settings = build_service_settings(tmp_path, max_stored_bytes=40 * KIB, max_document_bytes=30 * KIB)
    left = tmp_path / "ocr" / "documents" / "left-by-an-earlier-run"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(30 * KIB))
    async with run_service(tmp_path, settings=settings, keys_file=keys_file) as service:
        answer = await service.upload(padded_pdf(tmp_path, 20 * KIB), headers=acme)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full")
        found = await scrape(service)
        assert found["serving_ocr_storage_bytes"][("documents",)] == 30 * KIB
        assert found["serving_ocr_storage_used_ratio"][("documents",)] == 0.75
        assert found["serving_ocr_refusals_total"] == {("storage_full",): 1}
        left.unlink()
        await service.host.service.sweeper.look()
        assert (await service.upload(padded_pdf(tmp_path, 20 * KIB), headers=acme)).status_code == 200


async def test_results_have_a_bound_and_deleting_jobs_helps(tmp_path: Path) -> None:
    keys_file, (acme, other) = make_keys(tmp_path, "acme", "other")
    bounds: dict[str, Any] = {"max_result_bytes": 20 * KIB, "max_document_bytes": 5 * KIB}
    async with run_service(tmp_path, reads("x" * 6000), keys_file=keys_file, **bounds) as service:
        look = service.host.service.sweeper.look
        data = padded_pdf(tmp_path, 2 * KIB)
        ids = []
        for _ in range(2):
            status, job_id = await submit(service, data, acme)
            assert status == 202
            assert (await service.wait_for(job_id, "completed", headers=acme))["pages_done"] == 1
            ids.append(job_id)
        await look()
        assert 12_000 < service.host.service.storage.num_result_bytes < 14_000
        assert await submit(service, data, acme) == (429, "tenant_storage_full")
        assert (await service.upload(data, headers=acme)).status_code == 200  # nothing of it is kept
        status, job_id = await submit(service, data, other)
        assert status == 202
        await service.wait_for(job_id, "completed", headers=other)
        for each in ids:
            await service.client.delete(f"/v1/ocr/jobs/{each}", headers=acme)
        await look()
        assert (await submit(service, data, acme))[0] == 202
