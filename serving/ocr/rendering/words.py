"""Places the words of a page on its picture: lines by the page's ink, words by their widths. Needs numpy, no model.

Where the model gave a block's box, its words are looked for there, else on the whole page. Lines are the stretches of
rows with ink; which words stand in which line, and where a line is cut into words, is what fits the widths best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Edges = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels of the page."""
Ink = npt.NDArray[np.bool_]

_CONTRAST = 64
"""Difference of a grey level from the paper's that counts as ink."""
_NARROW, _WIDE = frozenset("iljtfrI.,:;'!|()[]1 "), frozenset("mwMW@%—")
_LEAST_LINE = 4
"""Rows that a line of text has at least."""
_PICTURE_HEIGHT = 3.5
"""What is higher than so many usual lines is a picture; titles are lower."""
_LEAST_FOR_MEDIAN = 3
_MAX_WORDS = 3000
"""Words of one page that are placed; the time for it grows with their number times the lines'."""
_MOST_PER_LINE = 60
_LEAST_FIT, _MOST_FIT = 0.12, 3.0
"""Bounds on a letter's width in relation to the lines' height: beyond them the text does not belong to the ink."""


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A part of the page to be placed."""

    text: str
    box: Edges | None
    """Where the model saw it; None if it did not say."""


@dataclass(frozen=True, slots=True)
class PlacedWord:
    text: str
    box: Edges


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block with its lines of words; without lines its place is unknown."""

    text: str
    box: Edges | None
    lines: tuple[tuple[PlacedWord, ...], ...]


def place_words(image: Image.Image, blocks: Sequence[TextBlock]) -> list[PlacedBlock]:
    """Place the words of all blocks; those without ink to support them have no lines."""
    ink = find_ink(image)
    placed: dict[int, PlacedBlock] = {}
    loose = [index for index, block in enumerate(blocks) if block.box is None]
    for index, block in enumerate(blocks):
        if block.box is not None:
            placed[index] = _place_in(ink, block.box, [block.text])[0]
            left, top, right, bottom = block.box
            if loose:
                ink[top:bottom, left:right] = False  # what was found is not there for others
    if loose:
        whole = (0, 0, image.width, image.height)
        found = _place_in(ink, whole, [blocks[index].text for index in loose])
        placed |= dict(zip(loose, found, strict=True))
    return [placed[index] for index in range(len(blocks))]


def find_ink(image: Image.Image) -> Ink:
    """Which pixels differ from the paper, which is the most frequent grey level."""
    grey = np.asarray(image.convert("L")).astype(np.int16)
    paper = int(np.bincount(grey.ravel(), minlength=256).argmax())
    return np.abs(grey - paper) >= _CONTRAST


def _place_in(ink: Ink, region: Edges, texts: Sequence[str]) -> list[PlacedBlock]:
    """Place texts that follow each other within a region."""
    left, top, right, bottom = region
    lines = _drop_pictures(find_lines(ink[top:bottom, left:right]))
    boxes = [(left + a, top + b, left + c, top + d) for a, b, c, d in lines]
    words = [(word, number) for number, text in enumerate(texts) for word in text.split()]
    widths = [measure(word) for word, _ in words]
    if not boxes or not words or len(words) > _MAX_WORDS or not _is_plausible(widths, boxes):
        return [PlacedBlock(text, None, ()) for text in texts]
    counts = assign_words(widths, [box[2] - box[0] for box in boxes])
    found: list[list[tuple[PlacedWord, ...]]] = [[] for _ in texts]
    start = 0
    for box, count in zip(boxes, counts, strict=True):
        chosen = words[start : start + count]
        start += count
        placed = _cut_line(ink, box, [word for word, _ in chosen])
        for number in dict.fromkeys(number for _, number in chosen):
            own = tuple(word for word, (_, owner) in zip(placed, chosen, strict=True) if owner == number)
            found[number].append(own)
    return [_build(text, lines_) for text, lines_ in zip(texts, found, strict=True)]


def _is_plausible(widths: Sequence[float], boxes: Sequence[Edges]) -> bool:
    """Whether letters as wide as the ink would have them are letters at all."""
    letter = sum(box[2] - box[0] for box in boxes) / sum(widths)
    height = float(np.median([box[3] - box[1] for box in boxes]))
    return _LEAST_FIT * height <= letter <= _MOST_FIT * height


def _build(text: str, lines: list[tuple[PlacedWord, ...]]) -> PlacedBlock:
    boxes = [word.box for line in lines for word in line]
    if not boxes:
        return PlacedBlock(text, None, ())
    return PlacedBlock(text, join_boxes(boxes), tuple(lines))


def join_boxes(boxes: Sequence[Edges]) -> Edges:
    """The smallest box around several."""
    return (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )


def find_lines(ink: Ink) -> list[Edges]:
    """Boxes of the lines of text in a region, from top to bottom."""
    rows = ink.any(axis=1)
    runs = find_runs(rows)
    if not runs:
        return []
    height = float(np.median([end - start for start, end in runs if end - start >= _LEAST_LINE] or [1]))
    merged: list[tuple[int, int]] = []
    for start, end in runs:
        # Dots and accents belong to the line that they almost touch.
        is_small = merged and min(end - start, merged[-1][1] - merged[-1][0]) < height * 0.4
        if is_small and start - merged[-1][1] <= max(2, height * 0.25):
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    lines = []
    for start, end in merged:
        columns = np.flatnonzero(ink[start:end].any(axis=0))
        if end - start >= _LEAST_LINE and columns.size:
            lines.append((int(columns[0]), start, int(columns[-1]) + 1, end))
    return lines


def _drop_pictures(lines: list[Edges]) -> list[Edges]:
    """Lines without those that are much higher than most: pictures, frames and drawings."""
    if len(lines) < _LEAST_FOR_MEDIAN:
        return lines
    usual = float(np.median([bottom - top for _, top, _, bottom in lines]))
    return [line for line in lines if line[3] - line[1] <= _PICTURE_HEIGHT * usual]


def find_runs(marks: npt.ArrayLike) -> list[tuple[int, int]]:
    """Where stretches of true begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], np.asarray(marks, bool), [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def measure(word: str) -> float:
    """The width of a word in units of an average letter, with the space after it."""
    width = 0.6  # the space
    for letter in word:
        width += 0.55 if letter in _NARROW else 1.6 if letter in _WIDE else 2.0 if ord(letter) > 0x2E7F else 1.0
    return width


def assign_words(words: Sequence[float], lines: Sequence[int]) -> list[int]:
    """How many of the words, in order, stand in each line, so that widths fit best.

    A dynamic programme over lines and words: a line costs the square of the difference between its width and that of
    its words, in relation to the widest line. Lines may be empty: pictures and rules have ink, too.
    """
    sums = np.concatenate(([0.0], np.cumsum(words)))
    widest = float(max(lines))
    scale = _find_scale(sums, lines)
    num_words = len(words)
    best = np.full(num_words + 1, np.inf)
    best[0] = 0.0
    choices: list[npt.NDArray[np.int64]] = []
    for width in lines:
        # Row: how many words this line takes; column: where it ends.
        options = np.full((min(_MOST_PER_LINE, num_words) + 1, num_words + 1), np.inf)
        options[0] = best + (width / widest) ** 2 * 0.5
        for count in range(1, options.shape[0]):
            shown = (sums[count:] - sums[:-count]) * scale
            options[count, count:] = best[: num_words + 1 - count] + ((shown - width) / widest) ** 2
        chosen = options.argmin(axis=0)
        choices.append(chosen)
        best = options[chosen, np.arange(num_words + 1)]
    if not np.isfinite(best[num_words]):
        return _spread(num_words, len(lines))
    counts, end = [0] * len(lines), num_words
    for index in range(len(lines) - 1, -1, -1):
        counts[index] = int(choices[index][end])
        end -= counts[index]
    return counts


def _find_scale(sums: npt.NDArray[np.float64], lines: Sequence[int]) -> float:
    """Pixels per average letter."""
    return float(sum(lines)) / float(sums[-1])


def _spread(num_words: int, num_lines: int) -> list[int]:
    """More words than lines can hold: the same number in each."""
    ends = [round(num_words * (number + 1) / num_lines) for number in range(num_lines)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _cut_line(ink: Ink, box: Edges, words: Sequence[str]) -> list[PlacedWord]:
    """Cut a line into words at those gaps whose places and widths fit best."""
    if not words:
        return []
    left, top, right, bottom = box
    gaps = [
        (start + left, end + left) for start, end in find_runs(~ink[top:bottom, left:right].any(axis=0)) if start > 0
    ]
    widths = np.array([measure(word) for word in words])
    ends = np.cumsum(widths)[:-1] * (right - left) / float(widths.sum()) + left
    cuts = choose_gaps([float(end) for end in ends], gaps, (right - left) / float(widths.sum()))
    starts = [left, *(end for _, end in cuts)]
    stops = [*(start for start, _ in cuts), right]
    return [
        PlacedWord(word, (start, top, max(start + 1, stop), bottom))
        for word, start, stop in zip(words, starts, stops, strict=True)
    ]


def choose_gaps(wanted: Sequence[float], gaps: Sequence[tuple[int, int]], letter: float) -> list[tuple[int, int]]:
    """The gaps that separate words: near where widths suggest, and wide. In order, each used once.

    Args:
        wanted: where words should end, in pixels.
        gaps: where there is no ink.
        letter: width of an average letter in pixels.
    """
    if not wanted:
        return []
    if len(gaps) < len(wanted):
        return [(round(place), round(place)) for place in wanted]
    centres = np.array([(start + end) / 2 for start, end in gaps])
    bonus = np.array([min(end - start, 2 * letter) for start, end in gaps]) / letter * 4
    best = np.zeros(len(gaps) + 1)
    choices = []
    for place in wanted:
        cost = np.abs(centres - place) / letter - bonus
        taken = best[:-1] + cost  # this gap after the best of the earlier ones
        running = np.minimum.accumulate(np.concatenate(([np.inf], taken)))
        choices.append(taken)
        best = running
    found: list[tuple[int, int]] = []
    end = len(gaps)
    for taken in reversed(choices):
        index = int(np.argmin(taken[:end]))
        found.append(gaps[index])
        end = index
        if end == 0 and len(found) < len(wanted):
            return [(round(place), round(place)) for place in wanted]
    return list(reversed(found))
