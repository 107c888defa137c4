"""Converts images with more than 8 bits per value to 8 bits. Imports neither torch nor vLLM nor OpenCV.

Pillow's own conversion clips values above 255, so that most such scans become white. Here values are scaled by the
range that the file uses:

- unsigned integers: white is the largest number with as many bits as the brightest pixel needs. 16-bit scans keep their
  full range, 12 bits in 16 are treated as 12 bits, and a dark page is brightened by a factor below two;
- signed integers with negative values: from the darkest pixel to the brightest;
- floats: 0 to 1 or 0 to 255 if the brightest pixel is between 25% and 125% of the upper limit (resampling overshoots)
  and no value is far below zero; otherwise from the darkest pixel, or zero, to the brightest. NaN becomes white.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

_PHOTOMETRIC, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 262, 258, 339
"""TIFF tags."""
_FLOAT_WHITES = (1.0, 255.0)
_ROWS_PIXELS = 2**20
"""Pixels that are scaled at a time: the intermediate steps need several times the memory of the image."""


def deep_to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert an image in Pillow's modes I, F or I;16 (in any byte order) to 8-bit RGB.

    Args:
        image: as opened by Pillow: the tags of a TIFF tell what its numbers mean.
        background: replaces pixels of the transparent colour.
    """
    values = _read_values(image)
    tags = getattr(image, "tag_v2", {})
    grey = Image.fromarray(_scale(values, is_inverted=tags.get(_PHOTOMETRIC) == 0)).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.paste(background, mask=Image.fromarray(values == transparent))
    return grey


def _read_values(image: Image.Image) -> npt.NDArray[np.generic]:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    # Pillow's 32-bit integers are signed, even if those of the file are not.
    is_unsigned = tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,)
    return values.view(np.uint32) if image.mode == "I" and is_unsigned else values


def _scale(values: npt.NDArray[np.generic], *, is_inverted: bool) -> npt.NDArray[np.uint8]:
    """Scale values to 0..255. If inverted, the smallest values are white."""
    black, white = _find_range(values)
    scaled = np.empty(values.shape, np.uint8)
    for rows in _cut(values.shape):
        part = values[rows].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            part = np.rint(np.clip((part - black) / (white - black), 0.0, 1.0) * 255)
        if is_inverted:
            part = 255 - part
        scaled[rows] = np.nan_to_num(part, copy=False, nan=255.0)
    return scaled


def _find_range(values: npt.NDArray[np.generic]) -> tuple[float, float]:
    """Return the values of black and white, which always differ."""
    low, high = _find_extremes(values)
    if values.dtype.kind != "f":
        return (low, max(high, low + 1)) if low < 0 else (0.0, 2.0 ** max(int(high).bit_length(), 1) - 1)
    for white in _FLOAT_WHITES:
        if white / 4 <= high <= white * 1.25 and low >= -white / 4:
            return 0.0, white
    low = min(low, 0.0)
    return (low, high) if high > low else (low, math.inf)


def _find_extremes(values: npt.NDArray[np.generic]) -> tuple[float, float]:
    if values.dtype.kind != "f":
        return float(values.min()), float(values.max())
    lows, highs = [], []
    for rows in _cut(values.shape):
        finite = values[rows][np.isfinite(values[rows])]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    return min(lows, default=0.0), max(highs, default=0.0)


def _cut(shape: tuple[int, ...]) -> Iterator[slice]:
    height, width = shape
    step = max(1, _ROWS_PIXELS // max(width, 1))
    return (slice(top, top + step) for top in range(0, height, step))
