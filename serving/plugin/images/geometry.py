"""How large a picture is as it is shown: turned by its orientation, with square pixels. Of its header alone.

Fax machines and some scanners have finer columns than rows (204 x 98 dots per inch); such a picture is as wide as it
should be and half as high. TIFF, PNG, JPEG and BMP say so by two resolutions.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import ExifTags, Image

Size = tuple[int, int]
"""Width and height in pixels."""

SWAPS_SIDES = range(5, 9)
"""Orientations that show a lying image upright."""
_ROUNDING = 0.02
"""Resolutions that differ by less are one that was rounded, in whole dots or in metric units."""
_LONGEST_PIXEL = 4.0
"""No scanner has longer ones; what says so is wrong."""
_DOTS = ("dpi", "aspect", "resolution")
"""Where Pillow keeps two resolutions; those without a unit are good enough for their ratio."""


def shown_size(image: Image.Image) -> Size:
    """Width and height of an image that was opened and not decoded, as `decoding.decode` gives it.

    The orientation of a PNG may stand behind its pixels, and is not seen then.
    """
    size, aspect = image.size, pixel_aspect(image)
    # Pillow itself swaps the sides of a TIFF.
    if _has_orientation(image) and orientation_of(image) in SWAPS_SIDES:
        size, aspect = (size[1], size[0]), 1 / aspect
    return square_size(size, aspect)


def square_size(size: Size, aspect: float) -> Size:
    """With square pixels: the coarser side gets more of them.

    Args:
        size: in pixels as they are.
        aspect: a pixel's width by its height.
    """
    width, height = size
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def pixel_aspect(image: Image.Image) -> float:
    """A pixel's width by its height, as Pillow shows the image before anything else turns it.

    1.0 for square pixels, and for resolutions that are missing or cannot be true. To be asked before the image is
    decoded.
    """
    horizontal, vertical = _read_dots(image)
    if not (math.isfinite(horizontal) and math.isfinite(vertical) and horizontal > 0 and vertical > 0):
        return 1.0
    aspect = vertical / horizontal
    if not 1 / _LONGEST_PIXEL <= aspect <= _LONGEST_PIXEL or abs(aspect - 1) < _ROUNDING:
        return 1.0
    tags = getattr(image, "tag_v2", {})
    return 1 / aspect if tags.get(ExifTags.Base.Orientation) in SWAPS_SIDES else aspect


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 where there is none or its data is damaged, as in vLLM."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - on hostile data Pillow's readers raise whatever they happen to
        return 1
    return value if isinstance(value, int) else 1


def _has_orientation(image: Image.Image) -> bool:
    """Whether there may be one that can be read without decoding, and has not been followed by Pillow."""
    if image.format in ("JPEG", "WEBP"):
        return "exif" in image.info or "xmp" in image.info
    return image.format == "PNG" and "exif" in image.info


def _read_dots(image: Image.Image) -> tuple[float, float]:
    """Dots per unit, horizontally and vertically; (1, 1) where nothing is said of them."""
    info: dict[Any, Any] = image.info
    found = info.get("jfif_density") if info.get("jfif_unit") == 0 else None
    dots = found or next((info[key] for key in _DOTS if key in info), (1, 1))
    try:
        horizontal, vertical = dots
        return float(horizontal), float(vertical)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 1.0, 1.0
