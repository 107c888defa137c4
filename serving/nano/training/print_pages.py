"""Pages of free print for training: any of three dozen fonts, any position, five layouts, and where every glyph is.

Not the renderer of `serving.nano.pages`, whose pages stand on a grid and which the shipped checkpoint was trained on.
A page is a pure function of its specification, split, seed and index.
"""

import io
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from serving.nano.texts import Random, Split
from serving.nano.training.fonts import MONO, MONO_CORE, PROPORTIONAL, Font
from serving.nano.training.glyphs import Coverage, glyph, hinted_glyph
from serving.nano.training.layouts import Setting, Typeset, sample_typeset

_MIDDLE = 0.3
"""A line's centre is so many ems above its baseline."""


@dataclass(frozen=True)
class PrintSpec:
    """What pages may look like. Shares are probabilities, ranges are inclusive."""

    fonts: tuple[tuple[Font, ...], ...] = ((MONO_CORE,), MONO, PROPORTIONAL)
    font_shares: tuple[float, ...] = (0.15, 0.25, 0.6)
    sizes_px: tuple[int, int] = (16, 30)
    num_chars: tuple[int, int] = (1, 420)
    side_px: int = 512
    pitch: tuple[float, float] = (1.1, 1.8)
    kerning_share: float = 0.7
    hinted_share: float = 0.3
    noise_share: float = 0.3
    jpeg_share: float = 0.2
    blur_share: float = 0.2
    turned_share: float = 0.25
    ruled_share: float = 0.25
    is_plain: bool = False
    """Only paragraphs and lists, as a measured set may want them."""


FREE = PrintSpec()


@dataclass(frozen=True)
class PrintPage:
    """A page and what is on it. Lengths in pixels."""

    pixels: NDArray[np.uint8]
    """[size, size], 255 is white."""
    text: str
    """Lines joined by newlines; a gap of any width is one space."""
    centers: NDArray[np.float32]
    """[len(text) + 1, 2]: x and y of every character's place; whitespace has it right behind the character before it,
    and so has the page's end, which comes last."""
    boxes: NDArray[np.float32]
    """[len(text), 4]: left, top, right and bottom of every glyph's ink before the page is turned; 0 for whitespace."""
    setting: Setting
    turn: float
    """Degrees by which the page is turned, anticlockwise."""


@dataclass
class _Drawing:
    """The page while it is drawn."""

    coverage: Coverage
    setting: Setting
    centers: list[tuple[float, float]] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    def stamp(self, char: str, pen: float, baseline: float) -> None:
        """Put a glyph on the page, cut at its edges."""
        style = self.setting
        if style.is_hinted:
            x, y = round(pen), round(baseline)
            drawn = hinted_glyph(style.font, style.size_px, char)
        else:
            quarter_x, quarter_y = round(pen * 4), round(baseline * 4)
            x, y = quarter_x >> 2, quarter_y >> 2
            drawn = glyph(style.font, style.size_px, char, quarter_x & 3, quarter_y & 3)
        height, width = drawn.ink.shape
        left, top = x + drawn.dx, y + drawn.dy
        self.boxes.append((left, top, left + width, top + height))
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + width, self.coverage.shape[1]), min(top + height, self.coverage.shape[0])
        if x0 < x1 and y0 < y1:
            view = self.coverage[y0:y1, x0:x1]
            np.maximum(view, drawn.ink[y0 - top : y1 - top, x0 - left : x1 - left], out=view)

    def write(self, typeset: Typeset) -> str:
        """Draw all lines and return the text."""
        rise, space = _MIDDLE * self.setting.size_px, self.setting.space_px
        parts: list[str] = []
        for row, line in enumerate(typeset.lines):
            middle = line.baseline - rise
            if row:
                parts.append("\n")
            for place, word in enumerate(line.words):
                if place:
                    parts.append(" ")
                parts.append(word.text)
                for char, pen, width in zip(word.text, word.pens, word.widths, strict=True):
                    self.stamp(char, pen, line.baseline)
                    self.centers.append((pen + width / 2, middle))
                # The place of the space, newline or end that follows.
                self.centers.append((word.pens[-1] + word.widths[-1] + space / 2, middle))
                self.boxes.append((0, 0, 0, 0))
        self.boxes.pop()
        return "".join(parts)


def _turn(coverage: Coverage, centers: NDArray[np.float32], degrees: float) -> tuple[Coverage, NDArray[np.float32]]:
    """Turn the page about its middle, anticlockwise."""
    turned = np.asarray(Image.fromarray(coverage).rotate(degrees, Image.Resampling.BILINEAR))
    angle, middle = np.deg2rad(degrees), np.float32(coverage.shape[0] / 2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = (centers - middle).T
    return turned, np.stack([x * cos + y * sin, y * cos - x * sin], 1) + middle


def _finish(coverage: Coverage, spec: PrintSpec, random: Random) -> NDArray[np.uint8]:
    """Turn coverage into grey levels: blur, paper and ink, noise, JPEG."""
    if random.random() < spec.blur_share:
        soft = Image.fromarray(coverage).filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 0.8))))
        coverage = np.asarray(soft)
    paper = 255 if random.random() < 0.5 else int(random.integers(215, 256))
    ink = 0 if random.random() < 0.5 else int(random.integers(0, 90))
    pixels = paper - coverage * np.float32((paper - ink) / 255)
    if random.random() < spec.noise_share:
        pixels += random.standard_normal(pixels.shape, np.float32) * np.float32(random.uniform(2, 14))
    grey = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    if random.random() >= spec.jpeg_share:
        return grey
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=int(random.integers(40, 91)))
    return np.asarray(Image.open(buffer))


def _sample_setting(spec: PrintSpec, random: Random) -> Setting:
    group = spec.fonts[int(random.choice(len(spec.fonts), p=spec.font_shares))]
    font = group[int(random.integers(len(group)))]
    low, high = spec.sizes_px
    size = int(random.integers(low, high + 1))
    # Wider letters at small sizes only, and narrower ones never by more than a pixel.
    spacing = float(random.uniform(-1, 2)) if random.random() < 0.4 else 0.0
    return Setting(
        font,
        size,
        pitch_px=size * float(random.uniform(*spec.pitch)),
        spacing_px=max(spacing, -0.03 * size),
        is_kerned=not font.is_mono and random.random() < spec.kerning_share,
        is_hinted=random.random() < spec.hinted_share,
    )


def sample_print(spec: PrintSpec, split: Split, seed: int, index: int) -> PrintPage:
    """Return page number `index` of the endless series that `spec`, `split` and `seed` define."""
    random = np.random.default_rng((seed, split == "test", index))
    setting = _sample_setting(spec, random)
    typeset = sample_typeset(setting, split, random, spec.side_px, spec.num_chars, is_plain=spec.is_plain)
    drawing = _Drawing(np.zeros((spec.side_px, spec.side_px), np.uint8), setting)
    text = drawing.write(typeset)
    if random.random() < spec.ruled_share:
        _rule(drawing.coverage, typeset, setting, random)
    centers = np.array(drawing.centers, np.float32)
    coverage, turn = drawing.coverage, 0.0
    if random.random() < spec.turned_share:
        turn = float(random.uniform(-1, 1))
        coverage, centers = _turn(coverage, centers, turn)
    pixels = _finish(coverage, spec, random)
    return PrintPage(pixels, text, centers, np.array(drawing.boxes, np.float32), setting, turn)


def _rule(coverage: Coverage, typeset: Typeset, setting: Setting, random: Random) -> None:
    """Draw rules between some lines, or a box around the text."""
    ink, thickness = int(random.integers(120, 256)), int(random.integers(1, 3))
    lines, size, side = typeset.lines, setting.size_px, coverage.shape[0]
    left = max(0, round(min(line.words[0].pens[0] for line in lines) - random.uniform(3, 14)))
    right = min(side, round(max(line.right for line in lines) + random.uniform(3, 14)))
    gap = setting.pitch_px - 0.95 * size
    below = [round(line.baseline + 0.25 * size + gap / 2) for line in lines]
    if random.random() < 0.5:
        top, bottom = round(lines[0].baseline - 0.95 * size - random.uniform(2, 10)), below[-1]
        for y in (top, bottom):
            if 0 <= y < side:
                coverage[y : y + thickness, left:right] = ink
        for x in (left, right - thickness):
            coverage[max(0, top) : max(0, bottom), x : x + thickness] = ink
    elif gap >= 3:
        for y in below:
            if random.random() < 0.3 and 0 <= y < side:
                coverage[y : y + thickness, left:right] = ink
