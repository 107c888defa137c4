"""Documents with two OCR services of the stack's, seen from outside."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.papers import write_pdf
from unit.ocr.rendering.test_hostile_documents import raw_pdf, stream

from e2e.scripted_stack import ScriptedStack, run_scripted_stack, wait_until
from serving.billing.credits import SERVICE_MARK

# That documents are read at all is seen in test_keys_and_doors.
pytestmark = pytest.mark.slow

SCRIPT = {"tokens_per_s": 40, "output_tokens": 20}
NUM_PAGES = 24
LARGE_BYTES = 55 * 2**20
"""More than `router.limits.max_body_bytes`."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedStack]:
    folder = tmp_path_factory.mktemp("stack")
    ocr = {
        "enabled": True,
        "num_replicas": 2,
        "cpus_per_replica": 0.1,
        "directory": str(folder / "ocr"),
        "pages_in_parallel": 4,
        "jobs": {"lease_s": 3, "poll_s": 0.5, "settle_s": 2},
    }
    billing = {"directory": str(folder / "billing"), "flush_s": 0.2}
    with run_scripted_stack(folder, SCRIPT, ocr=ocr, billing=billing) as stack:
        yield stack


@pytest.fixture
def http(stack: ScriptedStack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=60, trust_env=False) as client:
        yield client


def submit(http: httpx.Client, folder: Path, num_pages: int, path: str = "/v1/ocr/jobs") -> httpx.Response:
    pdf = write_pdf(folder / "x.pdf", num_pages, (100, 100)).read_bytes()
    return http.post(path, data={"model": "m", "format": "text"}, files={"file": ("x.pdf", pdf)})


def books(stack: ScriptedStack, query: str) -> list[Any]:
    with closing(sqlite3.connect(stack.folder / "billing" / "ledger.db")) as connection:
        return connection.execute(query).fetchall()


def find_services(http: httpx.Client) -> dict[str, int]:
    """Processes of the OCR services, by the id that they hold jobs with."""
    groups = [group for group in http.get("/metrics/targets").json() if group["labels"]["job"] == "ocr"]
    ports = {int(group["targets"][0].rpartition(":")[2]): group["labels"]["service"] for group in groups}
    listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    return {ports[each.laddr.port]: each.pid for each in listening if each.laddr.port in ports and each.pid}


def test_a_document_over_the_limit_of_other_bodies_passes(http: httpx.Client) -> None:
    pdf = raw_pdf(stream(b"0 0 10 10 re f"), stream(bytes(LARGE_BYTES)))
    answer = http.post("/v1/ocr", data={"model": "m"}, files={"file": ("x.pdf", pdf)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["document"]["size_bytes"] == len(pdf)


def test_the_other_service_goes_on_with_the_job_of_one_that_was_killed(
    stack: ScriptedStack, http: httpx.Client, tmp_path: Path
) -> None:
    job_id = submit(http, tmp_path, NUM_PAGES).json()["id"]
    wait_until(lambda: http.get(f"/v1/ocr/jobs/{job_id}").json()["pages_done"] >= 8, 60, "some pages were read")
    pages = http.get(f"/v1/ocr/jobs/{job_id}/pages").json()["data"]
    ((owner,),) = books(stack, f"SELECT lease_owner FROM ocr_jobs WHERE job_id = '{job_id}'")
    services = find_services(http)
    assert len(services) == 2
    os.kill(services[owner], signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while (job := ask_patiently(http, f"/v1/ocr/jobs/{job_id}"))["status"] != "completed":
        assert time.monotonic() < deadline_s, job
        time.sleep(0.2)
    assert (job["pages_done"], job["pages_failed"]) == (NUM_PAGES, 0)
    after = {page["number"]: page for page in ask_patiently(http, f"/v1/ocr/jobs/{job_id}/pages?limit=100")["data"]}
    assert all(after[page["number"]] == page for page in pages)
    # Each page was asked for once, but for the four that were under way; and each was paid for once.
    where = f"FROM requests WHERE request_id LIKE '{SERVICE_MARK}{job_id}-p%'"
    cost = round(job["usage"]["estimated_cost"] * 10**9)
    wait_until(lambda: books(stack, f"SELECT sum(cost_nanodollars) {where}") == [(cost,)], 10, "all is in the ledger")
    asked = [int(re.findall(r"-p(\d+)-t", row[0])[0]) for row in books(stack, f"SELECT request_id {where}")]
    assert NUM_PAGES <= len(asked) <= NUM_PAGES + 4
    assert all(asked.count(page["number"]) == 1 for page in pages)
    assert {page["usage"]["estimated_cost"] for page in after.values()} == {after[1]["usage"]["estimated_cost"]}


def ask_patiently(http: httpx.Client, path: str) -> dict[str, Any]:
    """A service that was killed may be asked once more before the routers know."""
    while True:
        answer = http.get(path)
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
        assert answer.status_code in (502, 503), answer.text


def test_a_reload_takes_the_service_away_and_brings_it_back(
    stack: ScriptedStack, http: httpx.Client, tmp_path: Path
) -> None:
    for is_enabled, status in ((False, 404), (True, 200)):
        stack.settings["ocr"]["enabled"] = is_enabled
        stack.write()
        done = stack.command("reload", "--config", str(stack.config))
        assert (done.returncode, done.stderr) == (0, ""), stack.log
        wait_until(lambda wanted=status: http.get("/").status_code == wanted, 30, f"/ answers {status}")  # type: ignore[misc]
        assert submit(http, tmp_path, 2, "/v1/ocr").status_code == status
        chat = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
    assert stack.log.count("In a browser:") == 2
