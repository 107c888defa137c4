"""Decodes an image file to RGB pixels. Imports neither torch nor vLLM.

Ordinary images are decoded exactly as by vLLM's own loader: the first frame, rotated according to its EXIF orientation,
with transparency blended over a background. vLLM renders three kinds so that they cannot be read: images with more than
8 bits per channel (see `depth`), images with non-square pixels (see `geometry`), and RGB with a transparent colour.
JPEG's draft mode, which decodes at a reduced size, is not used because its pixels differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from serving.plugin.images.geometry import Size, orientation_of, pixel_aspect, shown_size
from serving.plugin.images.picture import Colour, make_square, show
from serving.plugin.images.repairs import read_tolerantly

Pixels = npt.NDArray[np.uint8]

_JPEG_END = b"\xff\xd9"
_JPEG_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_LAZY_FORMATS = frozenset({"JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM"})
"""Formats whose header determines the size of the decoded image. Others may differ from their header."""
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Keys under which a PNG may have an orientation, possibly after its pixels, where only decoding finds it."""


class DecodeError(ValueError):
    """The data is not an image of an allowed format, or is incomplete."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header tells.

    size: size as displayed, after rotation, with square pixels.
    mode: Pillow's name of the file's pixel format.
    is_lazy: whether the size is reliable before decoding.
    """

    size: Size
    mode: str
    is_lazy: bool


def read_header(data: bytes, formats: tuple[str, ...]) -> Header:
    """Read an image's header without decoding its pixels.

    Args:
        data: the file.
        formats: Pillow's names of the allowed formats.

    Raises:
        DecodeError: the data is not an image of these formats.
    """
    try:
        return read_tolerantly(lambda data: _read_header(data, formats), data)
    except Exception as error:  # on hostile data Pillow's readers raise whatever they happen to
        raise DecodeError(f"Failed to load image: {error}") from error


def decode(data: bytes, formats: tuple[str, ...], background: Colour) -> Pixels | Image.Image:
    """Decode an image, rotate it as displayed, convert it to RGB and make its pixels square.

    Returns:
        uint8, shape (height, width, 3), contiguous; or a Pillow image in RGB if Pillow decoded it.

    Raises:
        DecodeError: the data is not an image of these formats, or is damaged.
    """
    try:
        return read_tolerantly(lambda data: _decode(data, formats, background), data)
    except Exception as error:  # on hostile data Pillow's readers raise whatever they happen to
        raise DecodeError(f"Failed to load image: {error}") from error


def size_of(page: Pixels | Image.Image) -> Size:
    """Width and height."""
    return page.size if isinstance(page, Image.Image) else (page.shape[1], page.shape[0])


def _read_header(data: bytes, formats: tuple[str, ...]) -> Header:
    image = Image.open(BytesIO(data), formats=formats)
    is_lazy = image.format in _LAZY_FORMATS
    if image.format == "PNG":
        is_lazy = not any(mark in data for mark in _PNG_ORIENTATION)
    return Header(shown_size(image), image.mode, is_lazy)


def _decode(data: bytes, formats: tuple[str, ...], background: Colour) -> Pixels | Image.Image:
    image: Image.Image = Image.open(BytesIO(data), formats=formats)
    aspect = pixel_aspect(image)
    pixels = _decode_jpeg(data, image)
    if pixels is None:
        return show(image, background)
    return pixels if aspect == 1.0 else make_square(Image.fromarray(pixels), aspect, orientation_of(image))


def _decode_jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """Decode with OpenCV's libjpeg-turbo, which gives Pillow's pixels in half the time; None if Pillow must do it."""
    # OpenCV fills the missing part of a truncated file with grey where Pillow refuses it, and reads CMYK differently.
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not data.endswith(_JPEG_END):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _JPEG_FLAGS)
    if pixels is None or pixels.shape != (image.height, image.width, 3):
        return None
    return _turn(pixels.astype(np.uint8, copy=False), orientation_of(image))


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
