"""Pages that nothing was trained on: a proportional font, and invoices laid out by rules of their own.

They say how far the model's envelope reaches. Text is held out as everywhere; a page is a function of kind, seed and
index. Runs of spaces are single ones in the text, since free layout does not say how many a gap is worth.
"""

from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from serving.nano.pages import Box, PageStyle, RenderedPage, load_font
from serving.nano.texts import Random, sample_lines, word_list

Kind = Literal["proportional", "invoice", "invoice on the grid"]
KINDS: tuple[Kind, ...] = ("proportional", "invoice", "invoice on the grid")

_SIZE_PX = 512
_INK = 20
_PAPER = 250

_Piece = tuple[float, str]
"""Left edge in pixels, and text."""


class _Sheet:
    """A page that is written on piece by piece, from the top."""

    def __init__(self, font: str, font_size_px: int, pitch_px: int | None) -> None:
        self._style = PageStyle(font, font_size_px, _PAPER, _INK, noise=0.0, jpeg_quality=None)
        self._font, self._pitch_px = load_font(font, font_size_px), pitch_px
        self._image = Image.new("L", (_SIZE_PX, _SIZE_PX), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._lines: list[str] = []
        self._boxes: list[Box] = []
        self._centers: list[tuple[float, float]] = []

    def write(self, baseline: int, *pieces: _Piece) -> None:
        """Write a line of pieces; those of the text have one space between them."""
        for place, (x, text) in enumerate(pieces):
            if place:
                self._centers.append((x, baseline - 8))
            for index, char in enumerate(text):
                at = x + (index * self._pitch_px if self._pitch_px else self._font.getlength(text[:index]))
                self._draw.text((at, baseline), char, fill=_INK, font=self._font, anchor="ls")
                self._centers.append((at + self._font.getlength(char) / 2, baseline - 8))
        self._centers.append((self._centers[-1][0] + 16, baseline - 8))
        end = pieces[-1][0] + len(pieces[-1][1]) * (self._pitch_px or 0) + self._font.getlength(pieces[-1][1])
        self._boxes.append((int(pieces[0][0]), baseline - 24, min(_SIZE_PX, int(end)), baseline + 8))
        self._lines.append(" ".join(text for _, text in pieces))

    def rule(self, y: int) -> None:
        """Draw a thin line from margin to margin."""
        self._draw.line((16, y, _SIZE_PX - 17, y), fill=_INK, width=2)

    def finish(self) -> RenderedPage:
        """Return the page."""
        centers = np.array(self._centers[:-1], np.float32)
        return RenderedPage(np.asarray(self._image), "\n".join(self._lines), self._boxes, centers, self._style)


def _proportional(random: Random) -> RenderedPage:
    sheet = _Sheet("sans", 24, None)
    lines = sample_lines(random, "test", int(random.integers(5, 13)), 30)
    left, top = int(random.integers(8, 40)), int(random.integers(24, 60))
    for row, line in enumerate(lines):
        sheet.write(top + row * 34, (left, " ".join(line.split())))
    return sheet.finish()


def _invoice(random: Random, pitch_px: int | None, step_px: int, left: int, top: int) -> RenderedPage:
    """Lay out title, addressee, a table between two rules, the total and a closing line."""
    sheet = _Sheet("mono", 26, pitch_px)
    words = [word_list("test")[int(i)].capitalize() for i in random.integers(0, len(word_list("test")), 12)]
    prices = random.integers(100, 90000, 4) / 100
    quantities = random.integers(1, 20, 4)
    columns = (left, left + 224, left + 304)
    row = iter(range(top, _SIZE_PX, step_px))
    number, day = int(random.integers(1000, 9999)), int(random.integers(1, 29))
    sheet.write(next(row), (left, f"INVOICE {number}"))
    sheet.write(next(row), (left, f"Date: {day:02}.{int(random.integers(1, 13)):02}.2025"))
    next(row)
    sheet.write(next(row), (left, f"{words[0]} {words[1]} Ltd."[:28]))
    sheet.write(next(row), (left, f"{day} {words[2]} Street"[:28]))
    sheet.rule(next(row) - step_px // 4)
    for word, quantity, price in zip(words[3:7], quantities, prices, strict=True):
        sheet.write(next(row), (columns[0], word[:12]), (columns[1], str(quantity)), (columns[2], f"{price:,.2f}"))
    sheet.rule(next(row) - step_px // 4)
    total = float((prices * quantities).sum())
    sheet.write(next(row), (columns[0], "Total EUR"), (columns[2], f"{total:,.2f}"))
    sheet.write(next(row), (left, f"Due in {day + 7} days."))
    return sheet.finish()


def stretch_page(kind: Kind, seed: int, index: int) -> RenderedPage:
    """Return page number `index` of a kind."""
    random = np.random.default_rng((seed, KINDS.index(kind), index))
    match kind:
        case "proportional":
            return _proportional(random)
        case "invoice":
            return _invoice(random, None, 35, left=int(random.integers(12, 40)), top=int(random.integers(26, 44)))
        case _:
            return _invoice(random, 16, 32, left=16, top=24)
