"""`python -m benchmarks.ocr_accuracy`: what a stack reads, mode by mode.

Documents of `serving.nano.documents` go through the OCR service as a client's would. For each mode: character error
rate, pages per second, dollars per 1,000 pages, and as in the paper's table the precision by length of text with the
compression: tokens of the true text for each vision token.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fastpath.rows import Row
from benchmarks.load.__main__ import find_stack
from serving.nano.documents import BookKind, BookPage, sample_sheet, write_document
from serving.nano.training.metrics import character_error_rate
from serving.ocr_api.shapes import OcrPage
from serving.ocr_client.client import DEFAULT_URL, Mode, OcrClient, ReadOptions

_MODES = ("tiny", "small", "base", "large", "gundam")
_VISION_TOKENS = {"tiny": 64, "small": 100, "base": 256, "large": 400, "gundam": 256}
"""Of a page of 512 pixels, separators not counted, as the paper counts; gundam cuts such a page into no tiles."""
_MAX_TOKENS = 480
"""More than any page has, and fewer than the loop stop needs: nothing is read again in another mode."""
_STEP = 50
"""Characters, in the table by length."""


@dataclass(frozen=True)
class Measured:
    """One mode."""

    mode: str
    rates: list[float]
    chars: list[int]
    """Of the true texts; nano has a token for each."""
    seconds: float
    dollars: float
    num_failed: int

    @property
    def error_percent(self) -> float:
        return 100 * float(np.mean(self.rates))

    @property
    def pages_per_s(self) -> float:
        return len(self.rates) / self.seconds

    @property
    def dollars_per_1000(self) -> float:
        return 1000 * self.dollars / len(self.rates)

    def compression(self, chars: Iterable[int]) -> float:
        return float(np.mean(list(chars))) / _VISION_TOKENS[self.mode]


def measure(client: OcrClient, book: Path, sheets: Sequence[BookPage], options: ReadOptions) -> Measured:
    """Read a book in one mode. A page that failed counts as wholly wrong."""
    began_s = time.monotonic()
    result = client.read(book, options)
    seconds = time.monotonic() - began_s
    rates = [_rate(page, sheet) for page, sheet in zip(result.pages, sheets, strict=True)]
    num_failed = result.usage.pages_failed
    chars = [len(sheet.text) for sheet in sheets]
    return Measured(str(options.mode), rates, chars, seconds, result.usage.estimated_cost, num_failed)


def _rate(page: OcrPage, sheet: BookPage) -> float:
    return character_error_rate(page.content, sheet.text) if page.is_completed else 1.0


def build_rows(found: Sequence[Measured]) -> list[Row]:
    """Beside the first mode, which is the peer of the others."""
    first = found[0]
    rows = []
    for one in found:
        rows += [
            Row.of_costs(f"{one.mode}: CER", one.error_percent, first.error_percent, first.mode, 0.0, "%"),
            Row.of_rates(f"{one.mode}: speed", one.pages_per_s, first.pages_per_s, first.mode, None, "pages/s"),
            Row.of_costs(
                f"{one.mode}: cost", one.dollars_per_1000, first.dollars_per_1000, first.mode, None, "$ per 1000 pages"
            ),
            Row.of_rates(
                f"{one.mode}: compression",
                one.compression(one.chars),
                first.compression(first.chars),
                first.mode,
                None,
                "text tokens per vision token",
            ),
        ]
    return rows


def to_json(found: Sequence[Measured], seed: int, kind: BookKind) -> dict[str, Any]:
    """All of it, for a file."""
    modes = [
        {
            "mode": one.mode,
            "vision_tokens": _VISION_TOKENS[one.mode],
            "error_percent": one.error_percent,
            "median_percent": 100 * float(np.median(one.rates)),
            "worst_percent": 100 * max(one.rates),
            "num_exact": sum(rate == 0 for rate in one.rates),
            "num_failed": one.num_failed,
            "pages_per_s": one.pages_per_s,
            "dollars_per_1000": one.dollars_per_1000,
            "compression": one.compression(one.chars),
        }
        for one in found
    ]
    about = {"num_pages": len(found[0].rates), "seed": seed, "kind": kind}
    return {**about, "modes": modes, "rows": [asdict(row) for row in build_rows(found)]}


def build_tables(found: Sequence[Measured]) -> list[Table]:
    """By mode, and as the paper has it by length of text."""
    by_mode = Table(title="by mode")
    for column in ("mode", "pages", "CER", "median", "worst", "exact", "failed", "pages/s", "$ / 1,000", "compression"):
        by_mode.add_column(column, justify="left" if column == "mode" else "right")
    for one in found:
        rates = np.array(one.rates)
        shares = (f"{100 * x:.2f}%" for x in (rates.mean(), np.median(rates), rates.max()))
        counts = (str(int((rates == 0).sum())), str(one.num_failed), f"{one.pages_per_s:.2f}")
        money = (f"{one.dollars_per_1000:.4f}", f"{one.compression(one.chars):.1f}x")
        by_mode.add_row(one.mode, str(len(rates)), *shares, *counts, *money)
    by_length = Table(title="precision and compression by length of text")
    by_length.add_column("text tokens")
    by_length.add_column("pages", justify="right")
    for one in found:
        by_length.add_column(f"{one.mode} ({_VISION_TOKENS[one.mode]})", justify="right")
    steps = [chars // _STEP for chars in found[0].chars]
    for step in sorted(set(steps)):
        places = [index for index, value in enumerate(steps) if value == step]
        cells = []
        for one in found:
            precision = 100 * (1 - float(np.mean([min(1.0, one.rates[index]) for index in places])))
            cells.append(f"{precision:.1f}%  {one.compression(one.chars[index] for index in places):.1f}x")
        by_length.add_row(f"{step * _STEP}-{(step + 1) * _STEP - 1}", str(len(places)), *cells)
    return [by_mode, by_length]


def main(
    url: Annotated[
        str, typer.Option(help="Of a running stack; without one at the default address it is started and stopped.")
    ] = DEFAULT_URL,
    key: Annotated[str | None, typer.Option(envvar="SERVING_API_KEY", help="Its API key.")] = None,
    model: Annotated[str, typer.Option(help="The model to measure.")] = "nano",
    mode: Annotated[list[str] | None, typer.Option(help="Modes; all of them if none is given.")] = None,
    pages: Annotated[int, typer.Option(min=1, help="Pages of the book.")] = 50,
    seed: Annotated[int, typer.Option(help="Of its text.")] = 100,
    kind: Annotated[BookKind, typer.Option(help="Of its text.")] = BookKind.PROSE,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure how well, how quickly and how cheaply a stack reads pages that the model never saw."""
    console = Console(width=130)
    sheets = [sample_sheet(seed, index, kind) for index in range(pages)]
    found: list[Measured] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        find_stack(url, console) as address,
        OcrClient(address, api_key=key, timeout_s=3600) as client,
    ):
        book = Path(folder) / "book.pdf"
        write_document(book, sheets)
        for name in mode or _MODES:
            if name not in get_args(Mode) or name not in _VISION_TOKENS:
                raise typer.BadParameter(f"{name}: there are {', '.join(_MODES)}", param_hint="--mode")
            options = ReadOptions(model, mode=name, format="text", max_tokens=_MAX_TOKENS)  # type: ignore[arg-type]
            with console.status(f"{name}: {pages} pages"):
                found.append(measure(client, book, sheets, options))
    for table in build_tables(found):
        console.print(table)
    if output is not None:
        output.write_text(json.dumps(to_json(found, seed, kind), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
