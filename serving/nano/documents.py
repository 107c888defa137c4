"""Multi-page PDFs that the nano checkpoint can read: `python -m serving.nano.documents --pages 50 --out book.pdf`.

A page is 3.56 inches a side, so that 144 dots per inch, the default of the OCR service, give the 512 pixels of nano's
own mode, and its characters stand on nano's grid of 16 x 32 pixels. The text is real text of a PDF, drawn by whatever
renders it, and not a picture of the training's own renderer. Words are of the split that training never saw: running
text, which is what nano reads best, or with `--kind mixed` also the forms and lists of its training. Beside
`book.pdf` a `book.json` has the true text of every page.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from serving.nano.pages import LINE_PX, PITCH_PX, find_font
from serving.nano.texts import sample_lines, sample_prose

DPI = 144
PAGE_PX = 512
FONT_PX = 26
_BASELINE_PX = 24
_POINTS_PER_PX = 72 / DPI
_COLUMNS = PAGE_PX // PITCH_PX
_MIN_CHARS, _MAX_CHARS = 100, 350
"""On a page; what the checkpoint's card was measured on."""
_MIN_LINES, _MAX_LINES = 4, 13


class BookKind(StrEnum):
    """What a book says."""

    PROSE = "prose"
    MIXED = "mixed"


@dataclass(frozen=True)
class BookPage:
    """One page's text and where its first character's cell is, in cells of the grid."""

    lines: tuple[str, ...]
    left: int
    top: int

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def sample_sheet(seed: int, index: int, kind: BookKind = BookKind.PROSE) -> BookPage:
    """Page `index` of the endless book that `seed` and `kind` define."""
    sample = sample_prose if kind is BookKind.PROSE else sample_lines
    random = np.random.default_rng((seed, 1, index))
    while True:
        num_lines = int(random.integers(_MIN_LINES, _MAX_LINES + 1))
        left, top = int(random.integers(0, 4)), int(random.integers(0, 3))
        lines = sample(random, "test", num_lines, _COLUMNS - left)
        if _MIN_CHARS <= sum(map(len, lines)) <= _MAX_CHARS:
            return BookPage(tuple(lines), left, top)


def write_document(file: Path, sheets: list[BookPage]) -> None:
    """Write a PDF with a page for each sheet.

    Raises:
        OSError: the file cannot be written.
    """
    from fpdf import FPDF

    side = PAGE_PX * _POINTS_PER_PX
    pdf = FPDF(unit="pt", format=(side, side))
    pdf.set_auto_page_break(auto=False)
    pdf.add_font("mono", fname=find_font("mono"))
    pdf.set_font("mono", size=FONT_PX * _POINTS_PER_PX)
    # The font's own pitch is a little under the grid's.
    pdf.set_char_spacing(PITCH_PX * _POINTS_PER_PX - pdf.get_string_width("0"))
    margin = (PITCH_PX * _POINTS_PER_PX - pdf.get_string_width("0")) / 2
    for sheet in sheets:
        pdf.add_page()
        for row, line in enumerate(sheet.lines, sheet.top):
            x = sheet.left * PITCH_PX * _POINTS_PER_PX + margin
            pdf.text(x, (row * LINE_PX + _BASELINE_PX) * _POINTS_PER_PX, line)
    pdf.output(str(file))


def main(
    out: Annotated[Path, typer.Option("--out", "-o", help="The PDF; its text goes beside it, as .json.")],
    pages: Annotated[int, typer.Option("--pages", min=1, max=10_000, help="Pages.")] = 50,
    seed: Annotated[int, typer.Option(help="Another seed is another text.")] = 100,
    kind: Annotated[BookKind, typer.Option(help="Running text alone, or forms and lists as well.")] = BookKind.PROSE,
) -> None:
    """Write a PDF of words that training never saw, in what the nano checkpoint can read, and its true text."""
    sheets = [sample_sheet(seed, index, kind) for index in range(pages)]
    write_document(out, sheets)
    out.with_suffix(".json").write_text(json.dumps([sheet.text for sheet in sheets], indent=1) + "\n")
    typer.echo(f"{out}: {pages} pages, {sum(len(sheet.text) for sheet in sheets)} characters")


if __name__ == "__main__":
    typer.run(main)
