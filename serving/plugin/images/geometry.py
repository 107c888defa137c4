"""The displayed size of an image, from its header: rotated according to its orientation, with square pixels.

Fax machines and some scanners have different horizontal and vertical resolutions (204 x 98 dots per inch); shown with
square pixels, such an image has the right width and half the height. TIFF, PNG, JPEG and BMP store both resolutions.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import ExifTags, Image

Size = tuple[int, int]
"""Width and height in pixels."""

SWAPS_SIDES = range(5, 9)
"""Orientations that rotate the image by 90 degrees."""
_ROUNDING = 0.02
"""Resolutions that differ by less are equal except for rounding to whole dots or metric units."""
_LONGEST_PIXEL = 4.0
"""Largest plausible ratio; no scanner has a larger one, so larger values are ignored."""
_DOTS = ("dpi", "aspect", "resolution")
"""Keys under which Pillow stores both resolutions; those without a unit still give a ratio."""


def shown_size(image: Image.Image) -> Size:
    """Return the width and height that `decoding.decode` will give for an image that was opened but not decoded.

    An orientation of a PNG that is stored after the pixels is not taken into account.
    """
    size, aspect = image.size, pixel_aspect(image)
    # Pillow itself swaps the dimensions of a TIFF.
    if _has_orientation(image) and orientation_of(image) in SWAPS_SIDES:
        size, aspect = (size[1], size[0]), 1 / aspect
    return square_size(size, aspect)


def square_size(size: Size, aspect: float) -> Size:
    """Return the size with square pixels; the side with the lower resolution grows.

    Args:
        size: size in the file's pixels.
        aspect: width of a pixel divided by its height.
    """
    width, height = size
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def pixel_aspect(image: Image.Image) -> float:
    """Return the width of a pixel divided by its height, in the orientation in which Pillow opens the image.

    It is 1.0 for square pixels, and if resolutions are missing or implausible. Call it before the image is decoded.
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
    """Return the EXIF orientation, 1..8; 1 if there is none or its data is damaged, as in vLLM."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - on hostile data Pillow's readers raise whatever they happen to
        return 1
    return value if isinstance(value, int) else 1


def _has_orientation(image: Image.Image) -> bool:
    """Whether there may be an orientation that can be read without decoding and that Pillow has not applied."""
    if image.format in ("JPEG", "WEBP"):
        return "exif" in image.info or "xmp" in image.info
    return image.format == "PNG" and "exif" in image.info


def _read_dots(image: Image.Image) -> tuple[float, float]:
    """Return the dots per unit, horizontally and vertically, or (1, 1) if they are not given."""
    info: dict[Any, Any] = image.info
    found = info.get("jfif_density") if info.get("jfif_unit") == 0 else None
    dots = found or next((info[key] for key in _DOTS if key in info), (1, 1))
    try:
        horizontal, vertical = dots
        return float(horizontal), float(vertical)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 1.0, 1.0
