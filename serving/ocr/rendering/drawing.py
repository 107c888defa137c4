"""What rendering processes share: errors, warnings, sizes and the encoding of a drawn page."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from PIL import Image

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
_LARGE_PNG_BYTES = 12 * 2**20
_JPEG_QUALITY = 95


class WarningKind(StrEnum):
    """What may be wrong with a page that was read all the same."""

    DAMAGED = "damaged"
    FONT_SUBSTITUTED = "font_substituted"
    FONT_MISSING = "font_missing"
    RESOLUTION_REDUCED = "resolution_reduced"
    CUT_INTO_PARTS = "cut_into_parts"
    TEXT_LAYER_UNUSED = "text_layer_unused"
    TEXT_LAYER_DIFFERS = "text_layer_differs"


class PageError(Exception):
    """A document or page that cannot be rendered; the message is for its owner."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Drawing:
    """A rendered page: a picture, or the document's own file if it can be passed on as it is."""

    image: Image.Image
    file: bytes | None = None
    media_type: str = ""
    """Of `file`."""
    dpi: int | None = None
    warnings: list[tuple[WarningKind, str]] = field(default_factory=list)

    def warn(self, kind: WarningKind, message: str) -> None:
        self.warnings.append((kind, message))

    def encode(self) -> tuple[bytes, dict[str, Any]]:
        """The image file, and the worker's answer that describes it."""
        if self.file is not None:
            data, media_type = self.file, self.media_type
        else:
            data, media_type = _encode(self.image)
        answer: dict[str, Any] = {
            "width": self.image.width,
            "height": self.image.height,
            "media_type": media_type,
            "dpi": self.dpi,
            "warnings": [(kind.value, message) for kind, message in self.warnings],
        }
        return data, answer


def fit_scale(width: float, height: float, max_pixels: int) -> float:
    """The factor, at most 1, by which both sides must shrink for the picture to have at most `max_pixels`."""
    pixels = math.ceil(width) * math.ceil(height)
    if pixels <= max_pixels:
        return 1.0
    scale = math.sqrt(max_pixels / pixels)
    # Sides are rounded up, and a side has at least one pixel.
    while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels and scale > 1e-6:
        scale *= 0.999
    return scale


def _encode(image: Image.Image) -> tuple[bytes, str]:
    """Encode losslessly, unless the file would be very large, as for photographs."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    if buffer.tell() <= _LARGE_PNG_BYTES:
        return buffer.getvalue(), "image/png"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), "image/jpeg"
