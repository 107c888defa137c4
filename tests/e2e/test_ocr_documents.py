"""Documents through the whole stack: the command, a service that is killed in the middle, and the page in Chromium."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from support.browser import run_chromium, visit

from e2e.conftest import ROOT, Stack, free_port
from e2e.scripted_stack import SERVING, wait_until
from serving.nano.documents import sample_sheet, write_document
from serving.nano.training.metrics import character_error_rate
from serving.ocr_client.client import OcrClient, ReadOptions

NUM_PAGES = 50
SHEETS = [sample_sheet(100, index) for index in range(NUM_PAGES)]
PAGES_AT_ONCE = 8  # `ocr.pages_in_parallel`


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("books") / "book.pdf"
    write_document(file, SHEETS)
    return file


class Service:
    """`serving ocr-service` beside the stack, which can be killed."""

    def __init__(self, folder: Path, router_url: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        places = {"SERVING__OCR__DIRECTORY": folder / "ocr", "SERVING__BILLING__DIRECTORY": folder / "billing"}
        self._environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
        self._command = [str(SERVING), "ocr-service", "--router", router_url, "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [*self._command, "--config", "configs/local.yaml"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=self._environment, start_new_session=True)
        wait_until(self._is_up, 60, "the service was up")

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def service(stack: Stack, tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path, stack.url)
    service.start()
    yield service
    service.kill()


def check_texts(texts: list[str]) -> None:
    """As well as the checkpoint can: of these pages it reads 44 to the letter (plain model, no stack)."""
    assert len(texts) == NUM_PAGES
    rates = [character_error_rate(text, sheet.text) for text, sheet in zip(texts, SHEETS, strict=True)]
    assert float(np.mean(rates)) <= 0.01, rates
    assert sum(rate == 0 for rate in rates) >= 40, rates


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_pages_survive_a_kill_of_the_service(stack: Stack, service: Service, book: Path, tmp_path: Path) -> None:
    read_before = stack.metric("vllm:request_success_total")
    out = tmp_path / "out"
    command: list[str | Path] = [SERVING, "ocr", book, "--out", out, "--format", "text", "--url", service.url]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    with OcrClient(service.url) as client:
        wait_until(lambda: bool(client.jobs().data), 120, "the job was there")
        job = client.jobs().data[0]
        wait_until(lambda: client.job(job.id).pages_done >= 15, 300, "some pages were done")
        service.kill()
        time.sleep(2)
        service.start()
        pages_then = client.job_pages(job.id).data
    _, told = run.communicate(timeout=600)
    assert run.returncode == 0, told
    check_texts(
        [
            text.removesuffix("\n")
            for text in out.joinpath(*book.parts[1:-1], f"{book.name}.txt").read_text().split("\f")
        ]
    )
    # Whatever was finished is still there, and only what was under way was asked for twice.
    assert 15 <= len(pages_then) < NUM_PAGES
    num_read = stack.metric("vllm:request_success_total") - read_before
    assert NUM_PAGES <= num_read <= NUM_PAGES + PAGES_AT_ONCE


@pytest.mark.slow
def test_a_document_is_read_on_the_page(stack: Stack, book: Path) -> None:
    with run_chromium() as browser, visit(browser, stack.url) as tab:
        expect(tab.page.locator("#model")).not_to_have_value("", timeout=30_000)
        tab.choose(book)
        tab.page.locator("#pages").fill("1-3")
        tab.read()
        tab.expect_status("Done: 3 of 3 pages read.")
        for number in (1, 2, 3):
            assert character_error_rate(tab.text(number), SHEETS[number - 1].text) <= 0.02
        assert tab.page.locator(".view img").first.evaluate("image => image.naturalWidth") == 512
        assert tab.page.locator("#cost").inner_text().startswith("$0.0000")
        tab.keep("playground-nano")


@pytest.mark.slow
def test_a_client_reads_a_document_through_the_stack(stack: Stack, book: Path) -> None:
    with OcrClient(stack.url) as client:
        result = client.read(book, ReadOptions("nano", pages="2,4", format="layout"))
        events = list(client.stream(book, ReadOptions("nano", pages="2", include_page_images=True)))
    assert [page.number for page in result.pages] == [2, 4]
    assert [page.content for page in result.pages] == [SHEETS[1].text, SHEETS[3].text]
    assert result.usage.estimated_cost > 0
    assert json.loads(events[-1].model_dump_json())["usage"]["pages_processed"] == 1
