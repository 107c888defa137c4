"""A PDF through the real stack: printed, drawn, read by the model, and answered by the address that users know."""

from __future__ import annotations

import difflib
import io
import time

import httpx
import pytest
from PIL import Image

from e2e.conftest import ROOT, Stack
from serving.nano.pages import CORE, sample_page

NUM_PAGES = 2


def print_pdf() -> tuple[bytes, list[str]]:
    """Pages that training never saw, and what they say."""
    pages = [sample_page(CORE, "test", 7, index) for index in range(NUM_PAGES)]
    first, *others = (Image.fromarray(page.pixels) for page in pages)
    buffer = io.BytesIO()
    first.save(buffer, "PDF", resolution=72.0, save_all=True, append_images=others, quality=100)
    return buffer.getvalue(), [page.text for page in pages]


@pytest.fixture
def http(stack: Stack) -> httpx.Client:
    return httpx.Client(base_url=stack.url, timeout=120, trust_env=False)


def check_texts(found: list[str], printed: list[str]) -> None:
    for text, wanted in zip(found, printed, strict=True):
        assert difflib.SequenceMatcher(None, text, wanted, autojunk=False).ratio() > 0.9, (text, wanted)


def test_a_printed_pdf_is_read(http: httpx.Client) -> None:
    pdf, printed = print_pdf()
    with http:
        form = {"model": "nano", "format": "text", "dpi": "72"}
        answer = http.post("/v1/ocr", data=form, files={"file": ("printed.pdf", pdf)})
        assert answer.status_code == 200, answer.text
        found = answer.json()
    check_texts([page["text"] for page in found["pages"]], printed)
    assert found["pages"][0]["mode"] == "tiny"
    assert found["usage"]["prompt_tokens_details"]["image_tokens"] == 73 * NUM_PAGES
    assert found["usage"]["estimated_cost"] == pytest.approx(
        sum(page["usage"]["estimated_cost"] for page in found["pages"])
    )


def test_a_job_reads_it_while_nobody_waits(http: httpx.Client) -> None:
    pdf, printed = print_pdf()
    with http:
        form = {"model": "nano", "format": "text", "dpi": "72"}
        job = http.post("/v1/ocr/jobs", data=form, files={"file": ("printed.pdf", pdf)}).json()
        deadline_s = time.monotonic() + 120
        while job["status"] in ("queued", "running"):
            assert time.monotonic() < deadline_s, job
            time.sleep(0.2)
            job = http.get(f"/v1/ocr/jobs/{job['id']}").json()
        assert (job["status"], job["pages_done"], job["pages_failed"]) == ("completed", NUM_PAGES, 0)
        pages = http.get(f"/v1/ocr/jobs/{job['id']}/pages").json()["data"]
        assert http.delete(f"/v1/ocr/jobs/{job['id']}").status_code == 204
    assert not (ROOT / "data/ocr/documents" / job["id"]).exists()
    check_texts([page["text"] for page in sorted(pages, key=lambda page: page["index"])], printed)


def test_the_page_for_people_is_there(http: httpx.Client) -> None:
    with http:
        answer = http.get("/")
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        groups = http.get("/metrics/targets").json()
        (ocr,) = (group for group in groups if group["labels"]["job"] == "ocr")
        assert "serving_ocr_pages_total" in httpx.get(f"http://{ocr['targets'][0]}/metrics", timeout=10).text
