"""Pictures of more than 8 bits a value to 8. Imports neither torch nor vLLM nor OpenCV.

Pillow's own conversion cuts what is over 255, so that most such scans come out white. Here values are scaled by the
range that the file uses:

- whole numbers: white is the largest number of as many bits as the brightest pixel needs. 16-bit scans keep their full
  range, 12 bits in 16 are taken for 12 bits, and a dark page is brightened by less than twice that;
- signed ones with negative values: from the darkest pixel to the brightest;
- floats: 0 to 1 or 0 to 255 where the brightest pixel lies between a quarter of that and a quarter above it (resampling
  overshoots), and nothing far below zero; else from the darkest pixel, or zero, to the brightest. What is not a number
  is white.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

_PHOTOMETRIC, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 262, 258, 339
"""Tags of TIFF."""
_FLOAT_WHITES = (1.0, 255.0)
_ROWS_PIXELS = 2**20
"""So many pixels are scaled at once: the steps in between need several times the memory of the picture."""


def deep_to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An image of Pillow's modes I, F and I;16 (in any byte order) in RGB of 8 bits.

    Args:
        image: as Pillow opened it: TIFF's tags are asked what its numbers mean.
        background: in the place of pixels of the colour that is transparent.
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
    # Pillow's 32-bit numbers have a sign, whether the file's have one or not.
    is_unsigned = tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,)
    return values.view(np.uint32) if image.mode == "I" and is_unsigned else values


def _scale(values: npt.NDArray[np.generic], *, is_inverted: bool) -> npt.NDArray[np.uint8]:
    """To 0..255; when it is inverted the smallest values are white."""
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
    """Values of black and of white, never the same."""
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
