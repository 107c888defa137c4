"""Reads the text that a PDF page contains, and judges whether it is all that the page shows."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from serving.ocr.rendering.drawing import WHITE
from serving.ocr.rendering.pdf import POINTS_PER_INCH, find_texts, open_pdf
from serving.plugin.images.picture import to_rgb

_CHECK_DPI = 50
"""Resolution at which the page's ink is compared with the places of the text."""
_LEAST_COVERED = 0.9
"""The part of a page's ink that must lie within the text. Figures and scans are outside of it."""
_MOST_STRANGE = 0.01
"""The part of the characters that may be unmapped, private or control characters."""
_INK = 48
"""Difference of a grey level from the paper's that counts as ink."""
_MAX_CHARS = 200_000
_INVISIBLE = 3
_HYPHEN = re.compile("[\x02\ufffe]\r?\n?")


@dataclass(frozen=True, slots=True)
class TextLine:
    text: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom, as parts of the page's width and height."""


@dataclass(frozen=True, slots=True)
class TextLayer:
    """The text of a page."""

    lines: tuple[TextLine, ...]
    flaw: str | None
    """Why the text is not all of the page, or not sane; None if it can be taken for the page."""


def read_text_layer(file: Path, page: int, password: str | None) -> TextLayer:
    """Read a page's text in lines.

    Raises:
        PageError: the document cannot be opened.
    """
    with open_pdf(file, password) as (document, _):
        opened = document[page]
        textpage = opened.get_textpage()
        width, height = opened.get_size()
        lines = _read_lines(opened, textpage, width, height)
        return TextLayer(lines, _find_flaw(opened, textpage, lines))


def _read_lines(page: Any, textpage: Any, width: float, height: float) -> tuple[TextLine, ...]:
    lines: list[TextLine] = []
    num_rects = textpage.count_rects() if textpage.count_chars() <= _MAX_CHARS else 0
    for number in range(num_rects):
        rect = textpage.get_rect(number)
        text = _HYPHEN.sub("-", textpage.get_text_bounded(*rect)).replace("\r\n", " ").strip()
        if text:
            lines.append(TextLine(text, _place(page, rect, width, height)))
    return _join_lines(lines)


def _place(
    page: Any, rect: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float]:
    """A rectangle of the PDF, on the page as it is shown: cropped and rotated."""
    import ctypes

    from pypdfium2 import raw

    left, bottom, right, top = rect
    corners = []
    steps = 10_000
    for x, y in ((left, top), (right, bottom)):
        shown_x, shown_y = ctypes.c_int(), ctypes.c_int()
        raw.FPDF_PageToDevice(page, 0, 0, steps, steps, 0, x, y, shown_x, shown_y)
        corners.append((shown_x.value / steps, shown_y.value / steps))
    (x1, y1), (x2, y2) = corners
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _join_lines(pieces: list[TextLine]) -> tuple[TextLine, ...]:
    """Join pieces beside each other: a change of the font begins a new one."""
    lines: list[TextLine] = []
    for piece in pieces:
        if lines and _is_beside(lines[-1].box, piece.box):
            last = lines.pop()
            box = (
                min(last.box[0], piece.box[0]),
                min(last.box[1], piece.box[1]),
                max(last.box[2], piece.box[2]),
                max(last.box[3], piece.box[3]),
            )
            lines.append(TextLine(f"{last.text} {piece.text}", box))
        else:
            lines.append(piece)
    return tuple(lines)


def _is_beside(left: tuple[float, float, float, float], right: tuple[float, float, float, float]) -> bool:
    height = min(left[3] - left[1], right[3] - right[1])
    overlap = min(left[3], right[3]) - max(left[1], right[1])
    return overlap > height / 2 and 0 <= right[0] - left[2] < 2 * max(height, 0.005)


def _find_flaw(page: Any, textpage: Any, lines: tuple[TextLine, ...]) -> str | None:
    from pypdfium2 import raw

    text = "".join(line.text for line in lines)
    if not text:
        return "the page has no text layer"
    strange = sum(unicodedata.category(letter) in ("Cc", "Co", "Cn", "Cs") or letter == "\ufffd" for letter in text)
    unmapped = sum(
        raw.FPDFText_HasUnicodeMapError(textpage, index) == 1
        for index in range(min(textpage.count_chars(), _MAX_CHARS))
    )
    if max(strange, unmapped) > _MOST_STRANGE * len(text):
        return "its characters have no known meaning"
    for each in find_texts(page):
        if raw.FPDFTextObj_GetTextRenderMode(each) == _INVISIBLE:
            return "it is invisible, as another program's reading of a scan is"
    covered = _measure_cover(page, lines)
    if covered < _LEAST_COVERED:
        return f"it covers only {covered:.0%} of what the page shows"
    return None


def _measure_cover(page: Any, lines: tuple[TextLine, ...]) -> float:
    """The part of the page's ink that lies within its lines of text."""
    grey = to_rgb(page.render(scale=_CHECK_DPI / POINTS_PER_INCH).to_pil(), WHITE).convert("L")
    paper = Image.new("L", grey.size, max(range(256), key=grey.histogram().__getitem__))
    ink = ImageChops.difference(grey, paper).point([255 if level >= _INK else 0 for level in range(256)])
    total = ink.histogram()[255]
    pen = ImageDraw.Draw(ink)
    for line in lines:
        left, top, right, bottom = line.box
        pen.rectangle(
            (left * ink.width - 2, top * ink.height - 2, right * ink.width + 2, bottom * ink.height + 2), fill=0
        )
    return 1 - ink.histogram()[255] / total if total else 1.0
