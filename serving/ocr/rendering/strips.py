"""Cuts pages that are extremely long or wide, such as receipts and log printouts, into parts that can be read. Pure.

A view of a page has a fixed number of pixels: of a strip that is eighty times as long as it is wide, a letter would be
smaller than a pixel in it. Cuts are made where the page has the least ink, so that lines stay whole.
"""

from __future__ import annotations

import itertools
import math

from PIL import Image

Edges = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

MAX_RATIO = 8.0
"""Pages whose longer side exceeds this many times the shorter one are cut."""
_PART_RATIO = 2.0
"""Longest part, as a multiple of the shorter side."""
_SLACK = 0.25
"""How far a cut may move to a place with less ink, as a fraction of a part's length."""
_MAX_PARTS = 64
_DARK = 128


def find_parts(image: Image.Image) -> list[Edges]:
    """The parts of a page in reading order; a single one unless the page is a strip."""
    width, height = image.size
    shorter, longer = sorted(image.size)
    if shorter < 1 or longer <= MAX_RATIO * shorter:
        return [(0, 0, width, height)]
    length = max(shorter * _PART_RATIO, longer / _MAX_PARTS)
    profile = _measure_ink(image, is_tall=height > width)
    cuts = _find_cuts(profile, length)
    if height > width:
        return [(0, top, width, bottom) for top, bottom in itertools.pairwise(cuts)]
    return [(left, 0, right, height) for left, right in itertools.pairwise(cuts)]


def _measure_ink(image: Image.Image, *, is_tall: bool) -> bytes:
    """The average blackness of each row of a tall page, or each column of a wide one."""
    grey = image.convert("L").point([255 if level < _DARK else 0 for level in range(256)])
    size = (1, image.height) if is_tall else (image.width, 1)
    return grey.resize(size, Image.Resampling.BOX).tobytes()


def _find_cuts(profile: bytes, length: float) -> list[int]:
    """Where parts begin and end. Each cut is in the widest empty stretch near the place that equal parts would have."""
    total = len(profile)
    num_parts = math.ceil(total / length)
    step = total / num_parts
    slack = int(step * _SLACK)
    cuts = [0]
    for number in range(1, num_parts):
        wanted = round(number * step)
        first, last = max(cuts[-1] + 1, wanted - slack), min(total - 1, wanted + slack)
        cuts.append(_find_gap(profile, first, last, wanted))
    return [*cuts, total]


def _find_gap(profile: bytes, first: int, last: int, wanted: int) -> int:
    """The middle of the longest run with the least ink between two places; of equal runs, the nearest."""
    least = min(profile[first : last + 1])
    best, best_length, start = wanted, 0, None
    for place in range(first, last + 2):
        is_gap = place <= last and profile[place] == least
        if is_gap and start is None:
            start = place
        elif not is_gap and start is not None:
            middle = (start + place) // 2
            if place - start > best_length or (
                place - start == best_length and abs(middle - wanted) < abs(best - wanted)
            ):
                best, best_length = middle, place - start
            start = None
    return best
