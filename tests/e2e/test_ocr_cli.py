"""`serving ocr` against the stack of the shipped settings: what a user types, and the exit status that he gets."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from support.papers import office_file

from e2e.conftest import ROOT, Stack, free_port
from e2e.scripted_stack import SERVING, wait_until
from serving.nano.documents import sample_sheet, write_document
from serving.nano.training.metrics import character_error_rate
from serving.ocr_client.client import OcrClient

SHEETS = [sample_sheet(7, index) for index in range(20)]
HALL_POINTS = 60 / 0.0254 * 72
"""60 m."""


def place(out: Path, file: Path) -> Path:
    """The text of a file that was given by its absolute path."""
    return out.joinpath(*file.parts[1:-1], f"{file.name}.txt")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("books") / "book.pdf"
    write_document(file, SHEETS)
    return file


def command(stack_url: str, out: Path, *arguments: str | Path) -> list[str]:
    return [str(SERVING), "ocr", *map(str, arguments), "--out", str(out), "--url", stack_url]


def run(stack_url: str, out: Path, *arguments: str | Path) -> tuple[int, str]:
    words = command(stack_url, out, *arguments)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def add_hall(book: Path, file: Path) -> Path:
    """The first two pages, and after them one of 60 m x 60 m, on which nothing could be read."""
    import pypdfium2

    document = pypdfium2.PdfDocument(book)
    for _ in range(len(SHEETS) - 2):
        document.del_page(2)
    document.new_page(HALL_POINTS, HALL_POINTS)
    document.save(file)
    document.close()
    return file


def test_a_document_is_read_and_the_status_is_zero(stack: Stack, book: Path, tmp_path: Path) -> None:
    status, told = run(stack.url, tmp_path / "out", book, "--pages", "1-3", "--format", "text")
    assert status == 0, told
    texts = place(tmp_path / "out", book).read_text().split("\f")
    for text, sheet in zip(texts, SHEETS[:3], strict=True):
        assert character_error_rate(text.removesuffix("\n"), sheet.text) <= 0.02
    assert "1 files read, 0 failed, 0 left out; 3 pages" in told
    assert "pages/s" in told
    assert "$0.0000" in told


def test_a_page_that_failed_is_status_one_and_the_others_are_there(stack: Stack, book: Path, tmp_path: Path) -> None:
    paper = add_hall(book, tmp_path / "hall.pdf")
    status, told = run(stack.url, tmp_path / "out", paper, "--format", "text")
    assert status == 1, told
    assert "hall.pdf, page 3: The page measures" in told
    first = place(tmp_path / "out", paper).read_text().split("\f")[0]
    assert character_error_rate(first.removesuffix("\n"), SHEETS[0].text) <= 0.02


def test_nothing_that_can_be_read_is_status_one(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "office.pdf").write_bytes(office_file())
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.7\n" + bytes(500))
    status, told = run(stack.url, tmp_path / "out", tmp_path / "office.pdf", tmp_path / "damaged.pdf")
    assert status == 1, told
    assert "soffice --convert-to pdf" in told
    assert "damaged" in told


def test_a_wrong_command_is_status_two_and_no_service_is_status_three(stack: Stack, book: Path, tmp_path: Path) -> None:
    assert run(stack.url, tmp_path / "out", tmp_path / "none.pdf")[0] == 2
    status, told = run(f"http://127.0.0.1:{free_port()}", tmp_path / "out", book, "--wait", "0")
    assert (status, "could not be reached" in told) == (3, True), told


def hear_ctrl_c() -> None:
    """A shell's background jobs, and all below them, are started deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_after_ctrl_c_the_same_command_goes_on(stack: Stack, book: Path, tmp_path: Path) -> None:
    before = stack.metric("vllm:request_success_total")
    words = command(stack.url, tmp_path / "out", book, "--format", "text")
    with OcrClient(stack.url) as client:
        known = {job.id for job in client.jobs().data}
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
        wait_until(lambda: any(job.id not in known for job in client.jobs().data), 60, "the job was there")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "the same command fetches their pages" in told
    status, told = run(stack.url, tmp_path / "out", book, "--format", "text")
    assert status == 0, told
    texts = place(tmp_path / "out", book).read_text().split("\f")
    rates = [character_error_rate(text.strip("\n"), sheet.text) for text, sheet in zip(texts, SHEETS, strict=True)]
    assert sum(rates) / len(rates) <= 0.02, rates
    assert stack.metric("vllm:request_success_total") - before == len(SHEETS), "each page was read once"
