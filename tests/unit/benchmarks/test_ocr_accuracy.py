"""What the accuracy of documents is made of: rates, compression, rows and tables, without a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.ocr_accuracy import Measured, build_rows, build_tables, measure
from serving.nano.documents import BookPage
from serving.ocr_api.shapes import OcrResult
from serving.ocr_client.client import ReadOptions

TINY = Measured("tiny", rates=[0.0, 0.02, 0.1], chars=[128, 192, 320], seconds=6.0, dollars=0.00003, num_failed=0)
BASE = Measured("base", rates=[0.0, 0.0, 0.04], chars=[128, 192, 320], seconds=12.0, dollars=0.00006, num_failed=1)


class Client:
    """Answers with what a service would have read."""

    def __init__(self, *pages: dict[str, Any]) -> None:
        self._pages = pages

    def read(self, source: Path, options: ReadOptions) -> OcrResult:
        pages = [{"index": n, "number": n + 1, "status": "completed", **page} for n, page in enumerate(self._pages)]
        failed = sum(page["status"] == "failed" for page in pages)
        usage = {"estimated_cost": 0.25, "pages_processed": len(pages) - failed, "pages_failed": failed}
        return OcrResult.model_validate({"id": "x", "model": "nano", "document": {}, "pages": pages, "usage": usage})


def test_a_book_is_measured_page_by_page_and_a_failed_page_is_wholly_wrong() -> None:
    sheets = [BookPage(("abcd", "efghi"), 0, 0), BookPage(("1234567890",), 0, 0), BookPage(("xyz",), 0, 0)]
    client: Any = Client({"text": "abcd\nefghi"}, {"text": "123456789"}, {"text": "xyz", "status": "failed"})
    found = measure(client, Path("book.pdf"), sheets, ReadOptions("nano", mode="small"))
    assert (found.mode, found.rates, found.chars) == ("small", [0.0, 0.1, 1.0], [10, 10, 3])
    assert (found.dollars, found.num_failed) == (0.25, 1)
    assert found.error_percent == pytest.approx(110 / 3)
    assert found.seconds > 0


def test_figures_of_a_mode() -> None:
    assert TINY.error_percent == pytest.approx(4.0)
    assert TINY.pages_per_s == 0.5
    assert TINY.dollars_per_1000 == pytest.approx(0.01)
    assert TINY.compression(TINY.chars) == pytest.approx(640 / 3 / 64)
    assert BASE.compression([512]) == 2.0


def test_rows_stand_beside_the_first_mode() -> None:
    rows = build_rows([TINY, BASE])
    assert [row.measure for row in rows] == [
        f"{mode}: {what}" for mode in ("tiny", "base") for what in ("CER", "speed", "cost", "compression")
    ]
    by_name = {row.measure: row for row in rows}
    assert by_name["base: CER"].ours == pytest.approx(4 / 3)
    assert {row.peer_name for row in rows} == {"tiny"}


def test_tables_show_every_mode_and_every_length() -> None:
    console = Console(width=200)
    with console.capture() as shown:
        for table in build_tables([TINY, BASE]):
            console.print(table)
    text = shown.get()
    lines = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("│")}
    assert {"3", "4.00%", "2.00%", "10.00%", "1", "0", "0.50", "0.0100", "3.3x"} <= set(lines["tiny"])
    assert {"1.33%", "0.00%", "4.00%", "2", "0.25", "0.0200", "0.8x"} <= set(lines["base"])
    assert {"90.0%", "5.0x", "96.0%", "1.2x"} <= set(lines["300-349"])
    assert [name for name in lines if "-" in name] == ["100-149", "150-199", "300-349"]
