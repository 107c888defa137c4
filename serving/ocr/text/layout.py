"""Parses grounded answers into blocks with boxes, incrementally. Pure.

With `<|grounding|>` in the prompt, the model writes a label and boxes before the text of each part of the page:

    <|ref|>title<|/ref|><|det|>[[88, 41, 912, 95]]<|/det|>
    # Annual report

Coordinates range from 0 to 999 over the width and height of the page as it was sent, in every resolution mode: the
published code (deepseek-ai/DeepSeek-OCR, `draw_bounding_boxes`) scales them to the size of the original image whether
the view was squeezed, padded or tiled. Padding therefore need not be subtracted here.

Answers may be truncated or malformed: the parser never raises, and loses no text outside of markup.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_REF, _REF_END = "<|ref|>", "<|/ref|>"
_DET, _DET_END = "<|det|>", "<|/det|>"
_MARKS = (_REF, _REF_END, _DET, _DET_END)
_MARK = re.compile("|".join(re.escape(mark) for mark in _MARKS))
_GROUP = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[^\d.+-]*([+-]?\d{1,6}(?:\.\d{0,6})?)[^\d.+-]*")
"""Numbers sometimes come with letters: `[[550, s 331, 652, 345]]`."""
_LAST = 999
"""The largest coordinate."""
_MAX_LABEL_CHARS = 1000
_MAX_BOXES_CHARS = 20_000
_MAX_GAP_CHARS = 16
"""Maximum white space between a label and its boxes."""


@dataclass(frozen=True, slots=True)
class Box:
    """In pixels of the page as it was sent; left <= right and top <= bottom."""

    left: int
    top: int
    right: int
    bottom: int

    def moved(self, right: int, down: int) -> Box:
        """The box at another place."""
        return Box(self.left + right, self.top + down, self.right + right, self.bottom + down)


@dataclass(frozen=True, slots=True)
class LayoutBlock:
    label: str
    """As the model wrote it (`title`, `text`, `table`, `image`, or what it was asked to find); empty for text before
    the first label."""
    boxes: tuple[Box, ...]
    text: str
    """The text up to the next block, stripped of white space."""


class LayoutParser:
    """Parses an answer from pieces. Where the answer was split does not affect the blocks."""

    def __init__(self, width: int, height: int) -> None:
        """Start a page of this width and height, in pixels of the image that was sent."""
        self._size = (width, height)
        self._pending = ""
        self._step: Callable[[bool], bool] = self._read_text
        self._blocks: list[LayoutBlock] = []
        self._label = ""
        self._boxes: tuple[Box, ...] = ()
        self._text: list[str] = []

    def feed(self, piece: str) -> list[LayoutBlock]:
        """Blocks that this piece completes: a block ends where the next one begins."""
        self._pending += piece
        return self._run(is_end=False)

    def finish(self) -> list[LayoutBlock]:
        """Blocks that the end of the answer completes. Truncated markup is dropped."""
        blocks = self._run(is_end=True)
        self._pending = ""
        self._close()
        blocks.extend(self._blocks)
        self._blocks = []
        return blocks

    def _run(self, *, is_end: bool) -> list[LayoutBlock]:
        while self._pending and self._step(is_end):
            pass
        blocks, self._blocks = self._blocks, []
        return blocks

    def _read_text(self, is_end: bool) -> bool:
        """One step of the parser: consumes pending text, and returns False when it needs more."""
        found = _MARK.search(self._pending)
        if found is None:
            # A truncated mark is dropped, but a single `<` may be text.
            num_held = _count_held(self._pending)
            if is_end and num_held == 1:
                num_held = 0
            self._take_text(len(self._pending) - num_held)
            return False
        self._take_text(found.start())
        self._drop(len(found.group()))
        self._part_text()
        if found.group() == _REF:
            self._step = self._read_label
        elif found.group() == _DET:
            self._step = self._read_boxes
        return True

    def _read_label(self, is_end: bool) -> bool:
        found = _MARK.search(self._pending)
        written = self._pending if found is None else self._pending[: found.start()]
        if "\n" in written.strip() or (is_end and found is None and " " in written):
            self._step = self._read_text  # the page itself contains `<|ref|>`
            return True
        if found is None and len(self._pending) <= _MAX_LABEL_CHARS + len(_REF_END):
            if is_end:
                self._pending = ""
            return False
        if found is None or found.start() > _MAX_LABEL_CHARS or found.group() != _REF_END:
            self._step = self._read_text  # no label after all
            return True
        self._close()
        self._label = self._pending[: found.start()].strip()
        self._drop(found.end())
        self._step = self._read_gap
        return True

    def _read_gap(self, is_end: bool) -> bool:
        rest = self._pending.lstrip()
        num_spaces = len(self._pending) - len(rest)
        if num_spaces <= _MAX_GAP_CHARS:
            if rest.startswith(_DET):
                self._drop(num_spaces + len(_DET))
                self._step = self._read_boxes
                return True
            if _DET.startswith(rest) and not is_end:
                return False
        self._step = self._read_text
        return True

    def _read_boxes(self, is_end: bool) -> bool:
        found = _MARK.search(self._pending)
        if found is None and len(self._pending) <= _MAX_BOXES_CHARS + len(_DET_END) and not is_end:
            return False
        end = found.start() if found is not None else len(self._pending)
        if end > _MAX_BOXES_CHARS:
            self._step = self._read_text
            return True
        if not self._boxes:
            self._boxes = read_boxes(self._pending[:end], *self._size)
        self._drop(found.end() if found is not None and found.group() == _DET_END else end)
        self._step = self._read_text
        return True

    def _take_text(self, num_chars: int) -> None:
        if num_chars:
            self._text.append(self._pending[:num_chars])
            self._drop(num_chars)

    def _part_text(self) -> None:
        """Separate words and numbers that only a mark separated."""
        if self._text and self._text[-1][-1].isalnum():
            self._text.append(" ")

    def _drop(self, num_chars: int) -> None:
        self._pending = self._pending[num_chars:]

    def _close(self) -> None:
        text = "".join(self._text).strip()
        if text or self._label or self._boxes:
            self._blocks.append(LayoutBlock(self._label, self._boxes, text))
        self._label, self._boxes, self._text = "", (), []


def parse_layout(text: str, width: int, height: int) -> list[LayoutBlock]:
    """The blocks of a complete answer for a page of this size in pixels."""
    parser = LayoutParser(width, height)
    return give_tables_back([*parser.feed(text), *parser.finish()])


def give_tables_back(blocks: Sequence[LayoutBlock]) -> list[LayoutBlock]:
    """Move markup to the table's block where the model wrote the caption between the table's label and its markup."""
    found = list(blocks)
    for index, (table, caption) in enumerate(itertools.pairwise(blocks)):
        start = caption.text.lower().find("<table")
        if table.label == "table" and not table.text and caption.label == "table_caption" and start >= 0:
            found[index] = replace(table, text=caption.text[start:])
            found[index + 1] = replace(caption, text=caption.text[:start].rstrip())
    return found


def read_boxes(text: str, width: int, height: int) -> tuple[Box, ...]:
    """Parse `[[x1, y1, x2, y2], ...]` into boxes in pixels; groups without exactly four numbers are left out.

    Coordinates are clamped to the page and sorted.
    """
    boxes = []
    for group in _GROUP.findall(text):
        found = [_NUMBER.fullmatch(number) for number in group.split(",")]
        numbers = [float(number.group(1)) for number in found if number is not None]
        if len(numbers) == len(found) == 4:
            x1, y1, x2, y2 = (min(max(number, 0.0), _LAST) / _LAST for number in numbers)
            (left, right), (top, bottom) = sorted((x1, x2)), sorted((y1, y2))
            boxes.append(Box(round(left * width), round(top * height), round(right * width), round(bottom * height)))
    return tuple(boxes)


def _count_held(text: str) -> int:
    """Number of characters at the end that may be the start of a mark."""
    start = text.rfind("<", max(0, len(text) - max(map(len, _MARKS)) + 1))
    return len(text) - start if start >= 0 and any(mark.startswith(text[start:]) for mark in _MARKS) else 0
