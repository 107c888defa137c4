"""From the bytes of an image file to RGB pixels, as vLLM's own loader makes them. Imports neither torch nor vLLM.

The order is vLLM's: the first frame, turned by its EXIF orientation, then converted, with transparency laid over a
background. JPEG's draft mode, which decodes at a fraction of the size, is not used: its pixels are other pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Size = tuple[int, int]
"""Width and height in pixels."""

_JPEG_END = b"\xff\xd9"
_JPEG_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_LAZY_FORMATS = frozenset({"JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM"})
"""Formats whose header says everything about the pixels' shape. The others change their minds when they are decoded."""
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Where a PNG may keep an orientation, possibly behind its pixels, so that finding out means decoding."""
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = range(5, 9)
"""Orientations that show a lying image upright."""


class DecodeError(ValueError):
    """Data that is not an image of a known format, or not a whole one."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a file says.

    size: as shown, after turning.
    mode: Pillow's name of the file's own pixel format.
    is_lazy: whether the size can be trusted before decoding.
    """

    size: Size
    mode: str
    is_lazy: bool


def read_header(data: bytes, formats: tuple[str, ...]) -> Header:
    """Look at an image without decoding its pixels.

    Args:
        data: the file.
        formats: names of Pillow's formats that are let in.

    Raises:
        DecodeError: not an image of these formats.
    """
    try:
        image = Image.open(BytesIO(data), formats=formats)
        is_lazy = image.format in _LAZY_FORMATS
        if image.format == "PNG":
            is_lazy = not any(mark in data for mark in _PNG_ORIENTATION)
        width, height = image.size
        # Pillow itself swaps the sides of a TIFF and of none of the other lazy formats.
        if is_lazy and image.format in ("JPEG", "WEBP") and _orientation(image) in _SWAPS_SIDES:
            width, height = height, width
    except Exception as error:  # on hostile data Pillow's readers raise whatever they happen to
        raise DecodeError(f"Failed to load image: {error}") from error
    return Header((width, height), image.mode, is_lazy)


def decode(data: bytes, formats: tuple[str, ...], background: Colour) -> Pixels | Image.Image:
    """Decode an image, bit for bit as vLLM does: turned, converted to RGB.

    Returns:
        uint8, shape (height, width, 3), contiguous; or a Pillow image in RGB where Pillow was the decoder.

    Raises:
        DecodeError: not an image of these formats, or damaged.
    """
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=formats)
        pixels = _decode_jpeg(data, image)
        if pixels is not None:
            return pixels
        image.load()
        orientation = _orientation(image)
        if orientation in _TURNED:
            image = image.transpose(_TURNED[orientation])
        return to_rgb(image, background)
    except Exception as error:  # on hostile data Pillow's readers raise whatever they happen to
        raise DecodeError(f"Failed to load image: {error}") from error


def size_of(page: Pixels | Image.Image) -> Size:
    """Width and height."""
    return page.size if isinstance(page, Image.Image) else (page.shape[1], page.shape[0])


def to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """An image in RGB, what shines through it laid over the background."""
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, background)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """OpenCV's libjpeg-turbo gives the pixels of Pillow's in half the time; None where Pillow must do it."""
    # OpenCV fills what is missing of a truncated file with grey where Pillow refuses, and reads CMYK differently.
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not data.endswith(_JPEG_END):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _JPEG_FLAGS)
    if pixels is None or pixels.shape != (image.height, image.width, 3):
        return None
    return _turn(pixels.astype(np.uint8, copy=False), _orientation(image))


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }
    return np.ascontiguousarray(turned.get(orientation, pixels))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 where there is none or its data is damaged, as in vLLM."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - as above; vLLM shows such an image unturned
        return 1
    return value if isinstance(value, int) else 1
