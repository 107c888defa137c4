"""Seeded pages of printed text with the boxes of every line, for training, measuring and demonstrating.

Characters stand on a grid of 16x32 pixels, which a 64-pixel cell of the encoder divides evenly. Fonts come from the
matplotlib package. A page is a pure function of its specification, split, seed and index.
"""

import importlib.util
import io
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from serving.nano.texts import Random, Split, sample_full_line, sample_lines, sample_spaced_lines

PITCH_PX = 16
LINE_PX = 32
_BASELINE_PX = 24
_MARGIN_PX = 12
"""Room around a glyph's own cell in its cached bitmap, so that wide glyphs are not cut."""

FONT_FILES = {
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "typewriter": "cmtt10.ttf",
}

_UNTRAINED_FONTS = {"sans": "DejaVuSans.ttf"}

GreyPage = NDArray[np.uint8]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class PageSpec:
    """What pages may look like. Shares are probabilities, ranges are inclusive, lengths in pixels."""

    fonts: tuple[str, ...] = ("mono",)
    font_sizes: tuple[int, int] = (26, 26)
    jitter_px: int = 2
    noise_share: float = 0.3
    jpeg_share: float = 0.0
    margin_share: float = 0.5
    gap_share: float = 0.0
    """Share of pages with empty rows between some lines; they are not part of the text."""
    spaced_share: float = 0.0
    """Share of pages that are forms and tables with wide gaps inside their lines."""
    full_share: float = 0.0
    """Share of pages whose last line, and some of the others, ends at most two characters before the right edge."""
    num_lines: tuple[int, int] = (1, 14)
    num_chars: tuple[int, int] = (1, 400)
    size_px: int = 512


CORE = PageSpec()
WIDE = PageSpec(fonts=tuple(FONT_FILES), font_sizes=(22, 28), jitter_px=4, jpeg_share=0.3)


@dataclass(frozen=True)
class PageStyle:
    """How one page looks."""

    font: str
    font_size_px: int
    paper: int
    ink: int
    noise: float
    jpeg_quality: int | None


@dataclass(frozen=True)
class RenderedPage:
    """A rendered page and what is on it."""

    pixels: GreyPage
    """[size, size], 255 is white."""
    text: str
    """Lines joined by newlines."""
    line_boxes: list[Box]
    """Left, top, right, bottom of every line, in pixels, right and bottom exclusive."""
    centers: NDArray[np.float32]
    """[len(text), 2]: x and y of every character's place; a newline's is right behind its line."""
    style: PageStyle


def find_font(name: str) -> Path:
    """Return the file of a font, one of `FONT_FILES` or `sans`, without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the page renderer takes its fonts from the matplotlib package, which is not installed")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / (FONT_FILES | _UNTRAINED_FONTS)[name]


@cache
def _glyph(font: str, size_px: int, char: str) -> tuple[GreyPage, int, int]:
    """Return a glyph's coverage, cut to its ink, and the ink's x and y relative to the character's cell."""
    loaded = load_font(font, size_px)
    canvas = Image.new("L", (PITCH_PX + 2 * _MARGIN_PX, LINE_PX + 2 * _MARGIN_PX))
    left = _MARGIN_PX + (PITCH_PX - loaded.getlength(char)) / 2
    ImageDraw.Draw(canvas).text((left, _MARGIN_PX + _BASELINE_PX), char, fill=255, font=loaded, anchor="ls")
    box = canvas.getbbox() or (_MARGIN_PX, _MARGIN_PX, _MARGIN_PX, _MARGIN_PX)
    return np.asarray(canvas.crop(box)), box[0] - _MARGIN_PX, box[1] - _MARGIN_PX


@cache
def load_font(font: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Return a font of `find_font` at a size."""
    return ImageFont.truetype(find_font(font), size_px, layout_engine=ImageFont.Layout.BASIC)


def _stamp(canvas: GreyPage, glyph: tuple[GreyPage, int, int], x: int, y: int) -> None:
    """Put a glyph's coverage on the canvas with its cell at (x, y), cut at the page's edges."""
    ink, dx, dy = glyph
    top, left = max(0, y + dy), max(0, x + dx)
    bottom, right = min(canvas.shape[0], y + dy + ink.shape[0]), min(canvas.shape[1], x + dx + ink.shape[1])
    if top < bottom and left < right:
        part = ink[top - y - dy : bottom - y - dy, left - x - dx : right - x - dx]
        view = canvas[top:bottom, left:right]
        np.maximum(view, part, out=view)


def _finish(coverage: GreyPage, style: PageStyle, random: Random) -> GreyPage:
    """Turn coverage into grey levels, with the style's noise and JPEG artefacts."""
    pixels = style.paper - coverage * np.float32((style.paper - style.ink) / 255)
    if style.noise > 0:
        pixels += random.standard_normal(pixels.shape, np.float32) * np.float32(style.noise)
    grey = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    if style.jpeg_quality is None:
        return grey
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=style.jpeg_quality)
    return np.asarray(Image.open(buffer))


def render_page(
    lines: list[str], style: PageStyle, offsets: NDArray[np.int64], random: Random, size_px: int = 512
) -> RenderedPage:
    """Draw `lines` from the top, each shifted by its row of `offsets` ([len(lines), 2], x and y in pixels)."""
    coverage = np.zeros((size_px, size_px), np.uint8)
    boxes: list[Box] = []
    centers: list[tuple[float, float]] = []
    for row, (line, (x, y)) in enumerate(zip(lines, offsets.tolist(), strict=True)):
        top = y + row * LINE_PX
        for column, char in enumerate(line):
            _stamp(coverage, _glyph(style.font, style.font_size_px, char), x + column * PITCH_PX, top)
        places = range(len(line) + (row < len(lines) - 1))
        centers += [(x + (place + 0.5) * PITCH_PX, top + 0.5 * LINE_PX) for place in places]
        right, bottom = x + len(line) * PITCH_PX, top + LINE_PX
        boxes.append((max(0, x), max(0, top), min(size_px, right), min(size_px, bottom)))
    pixels = _finish(coverage, style, random)
    return RenderedPage(pixels, "\n".join(lines), boxes, np.array(centers, np.float32).reshape(-1, 2), style)


def _sample_style(spec: PageSpec, random: Random) -> PageStyle:
    low, high = spec.font_sizes
    paper = 255 if random.random() < 0.5 else int(random.integers(225, 256))
    return PageStyle(
        font=spec.fonts[int(random.integers(len(spec.fonts)))],
        font_size_px=int(random.integers(low, high + 1)),
        paper=paper,
        ink=0 if random.random() < 0.5 else int(random.integers(0, 70)),
        noise=float(random.uniform(2, 14)) if random.random() < spec.noise_share else 0.0,
        jpeg_quality=int(random.integers(40, 91)) if random.random() < spec.jpeg_share else None,
    )


def _sample_text(spec: PageSpec, split: Split, random: Random) -> tuple[list[str], int, int]:
    """Return lines whose characters number within the spec's range, and left and top margins in grid steps."""
    max_columns, max_rows = spec.size_px // PITCH_PX, spec.size_px // LINE_PX
    low, high = spec.num_chars
    for _ in range(1000):
        num_lines = int(random.integers(spec.num_lines[0], spec.num_lines[1] + 1))
        with_margin = random.random() < spec.margin_share
        left = int(random.integers(0, 4)) if with_margin else 0
        top = int(random.integers(0, min(3, max_rows - num_lines) + 1)) if with_margin else 0
        width = max(1, max_columns - left - (int(random.integers(0, 12)) if random.random() < 0.5 else 0))
        is_spaced = spec.spaced_share > 0 and random.random() < spec.spaced_share
        lines = (sample_spaced_lines if is_spaced else sample_lines)(random, split, num_lines, width)
        if spec.full_share > 0 and random.random() < spec.full_share:
            lines = _with_full_lines(lines, max_columns - left, split, random)
        if low <= sum(map(len, lines)) <= high:
            return lines, left, top
    raise ValueError(f"no page fits {spec}")


def _with_full_lines(lines: list[str], width: int, split: Split, random: Random) -> list[str]:
    """Return the lines with the last one, and a share of the others, replaced by full ones.

    Behind such a line there is no paper that could tell a reader whether another follows.
    """
    share = random.uniform(0, 0.5)
    is_full = [*(random.random(len(lines) - 1) < share), True]
    lengths = width - random.integers(0, 3, len(lines))
    return [
        sample_full_line(random, split, int(length)) if full else line
        for line, full, length in zip(lines, is_full, lengths, strict=True)
    ]


def sample_page(spec: PageSpec, split: Split, seed: int, index: int) -> RenderedPage:
    """Return page number `index` of the endless series that `spec`, `split` and `seed` define."""
    random = np.random.default_rng((seed, split == "test", index))
    style = _sample_style(spec, random)
    lines, left, top = _sample_text(spec, split, random)
    jitter = spec.jitter_px
    shift = random.integers(-jitter, jitter + 1, 2) + random.integers(-(jitter // 2), jitter // 2 + 1, (len(lines), 2))
    offsets = np.clip(shift, -jitter, jitter) + np.array([left * PITCH_PX, top * LINE_PX])
    if spec.gap_share and random.random() < spec.gap_share:
        room = spec.size_px // LINE_PX - top - len(lines)
        offsets[:, 1] += LINE_PX * np.sort(random.integers(0, room + 1, len(lines)))
    return render_page(lines, style, offsets, random, spec.size_px)


def with_chars(spec: PageSpec, low: int, high: int) -> PageSpec:
    """Return `spec` limited to pages of `low` to `high` characters, newlines not counted."""
    return replace(spec, num_chars=(low, high))
