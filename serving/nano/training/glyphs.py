"""Glyphs to stamp and the metrics to set them by.

A glyph is drawn once at four times its size and averaged down at any quarter of a pixel, which is close to what
renderers without hinting draw; or, for a share of the pages, as FreeType hints it at its size.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from serving.nano.training.fonts import Font, load

_OVERSAMPLING = 4
_EM_PX = 256
"""The size at which widths are taken, large enough for hinting not to matter."""

Coverage = NDArray[np.uint8]


@dataclass(frozen=True)
class Glyph:
    """A glyph's coverage, cut to its ink, and where the ink begins relative to pen and baseline, in pixels."""

    ink: Coverage
    dx: int
    dy: int


def _draw(font: ImageFont.FreeTypeFont, char: str) -> tuple[Coverage, int, int]:
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    if right <= left or bottom <= top:
        return np.zeros((0, 0), np.uint8), 0, 0
    x, y = int(np.floor(left)) - 1, int(np.floor(top)) - 1
    canvas = Image.new("L", (int(np.ceil(right)) - x + 2, int(np.ceil(bottom)) - y + 2))
    ImageDraw.Draw(canvas).text((-x, -y), char, fill=255, font=font, anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return np.zeros((0, 0), np.uint8), 0, 0
    return np.asarray(canvas.crop(box)), x + box[0], y + box[1]


@lru_cache(maxsize=50_000)
def _draw_large(font: Font, size_px: int, char: str) -> tuple[Coverage, int, int]:
    return _draw(load(font, size_px * _OVERSAMPLING), char)


@lru_cache(maxsize=100_000)
def glyph(font: Font, size_px: int, char: str, phase_x: int, phase_y: int) -> Glyph:
    """Return a glyph whose pen stands `phase_x` and `phase_y` quarters of a pixel right of and below a pixel's edge."""
    ink, left, top = _draw_large(font, size_px, char)
    if not ink.size:
        return Glyph(ink, 0, 0)
    left, top = left + phase_x, top + phase_y
    dx, dy = left // _OVERSAMPLING, top // _OVERSAMPLING
    pad_x, pad_y = left - dx * _OVERSAMPLING, top - dy * _OVERSAMPLING
    height, width = -(-(ink.shape[0] + pad_y) // 4), -(-(ink.shape[1] + pad_x) // 4)
    canvas = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING), np.uint16)
    canvas[pad_y : pad_y + ink.shape[0], pad_x : pad_x + ink.shape[1]] = ink
    mean = canvas.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING).sum((1, 3)) // _OVERSAMPLING**2
    return Glyph(mean.astype(np.uint8), dx, dy)


@lru_cache(maxsize=50_000)
def hinted_glyph(font: Font, size_px: int, char: str) -> Glyph:
    """Return a glyph as FreeType hints it, for a pen at a pixel's edge."""
    return Glyph(*_draw(load(font, size_px), char))


@cache
def advance(font: Font, char: str) -> float:
    """Return how far the pen moves, in ems."""
    return float(load(font, _EM_PX).getlength(char)) / _EM_PX


@cache
def _shaped(font: Font) -> ImageFont.FreeTypeFont:
    """Return a font whose lengths know the kerning of OpenType."""
    return ImageFont.truetype(str(font.path), _EM_PX, layout_engine=ImageFont.Layout.RAQM)


@cache
def kerning(font: Font, pair: str) -> float:
    """Return by how much the pair's second letter is moved, in ems."""
    shaped = _shaped(font)
    both, first, second = (shaped.getlength(text, features=["-liga"]) for text in (pair, pair[0], pair[1]))
    return float(both - first - second) / _EM_PX


@cache
def hinted_advance(font: Font, size_px: int, char: str) -> float:
    """Return how far the pen moves, in pixels, for a hinted font."""
    return float(round(load(font, size_px).getlength(char)))
