"""Checks images before a replica decodes them: format and size are read from the header alone."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import pybase64
from PIL import Image, UnidentifiedImageError

from serving.errors import BadBase64Error, ImageTooLargeError, InvalidImageError, InvalidRequestError
from serving.http.base64_text import repair_base64
from serving.plugin.images.geometry import shown_size
from serving.plugin.images.repairs import read_tolerantly
from serving.settings.router import RouterSettings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF")
"""Accepted formats, recognised by content; the media type in the data URL does not matter."""

_HEAD = re.compile(r"""data:[A-Za-z0-9!#$&^_.+*/;="-]{0,255};base64""")
"""The part before the comma."""
_MAX_URL_CHARS = 8192
_HEAD_CHARS = 64 * 1024  # a multiple of four, so that the part is valid base64


def repair_data_url(url: str) -> str:
    """The URL with its data in strict base64: without line breaks, in the standard alphabet, and padded."""
    head, _, encoded = url.partition(",")
    return f"{head},{repair_base64(encoded)}"


def check_image_url(url: Any, param: str, router: RouterSettings) -> tuple[int, int] | None:
    """Check an image's URL. Returns the image's width and height, None for a remote image.

    Args:
        url: the part's URL as sent by the client.
        param: its place in the request, for error messages.
        router: limits, and whether remote images are allowed.

    Raises:
        BadBase64Error: its data is not strict base64, as the engine requires it.
        RequestError: it is not a data URL, not an image, or over the pixel limit.
    """
    if not isinstance(url, str) or not url:
        raise InvalidRequestError("image_url must hold a URL.", param=param)
    if not url.startswith("data:"):
        if router.remote_images.enabled and url.startswith(("http://", "https://")) and len(url) <= _MAX_URL_CHARS:
            return None
        raise InvalidImageError(
            "Only data: URLs are accepted (data:image/png;base64,...); remote images are disabled.", param=param
        )
    head, _, encoded = url.partition(",")
    if not _HEAD.fullmatch(head):
        raise InvalidImageError("The image's data URL must be base64: data:image/png;base64,...", param=param)
    if len(encoded) % 4:
        raise _bad_base64(param)
    size = _read_encoded_size(encoded, param)
    check_size(size, param, router)
    return size


def check_size(size: tuple[int, int], param: str, router: RouterSettings) -> None:
    """Refuse an image over the pixel limit.

    Raises:
        ImageTooLargeError: it has too many pixels.
    """
    width, height = size
    if width * height > router.limits.max_image_pixels:
        raise ImageTooLargeError(
            f"The image has {width} x {height} pixels; {router.limits.max_image_pixels} pixels are allowed.",
            param=param,
        )


def _read_encoded_size(encoded: str, param: str) -> tuple[int, int]:
    """Most headers are within the first kilobytes; the whole image is decoded only if not (TIFF, long EXIF)."""
    if len(encoded) > _HEAD_CHARS:
        try:
            return read_size(_decode(encoded[:_HEAD_CHARS], param), param)
        except (ImageTooLargeError, BadBase64Error):
            raise
        except InvalidImageError:
            pass
    return read_size(_decode(encoded, param), param)


def _decode(encoded: str, param: str) -> bytes:
    try:
        return pybase64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise _bad_base64(param) from error


def _bad_base64(param: str) -> BadBase64Error:
    return BadBase64Error("The image's data URL is not valid base64.", param=param)


def read_size(data: bytes, param: str) -> tuple[int, int]:
    """Width and height from the header, as the engine will see the image; no pixel is decoded.

    Raises:
        InvalidImageError: it is not an image in an accepted format.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and odd metadata; our own limit decides, and the engine handles the rest.
            warnings.simplefilter("ignore")
            return read_tolerantly(_read_shown_size, data)
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("The image has far too many pixels.", param=param) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError) as error:
        known = ", ".join(FORMATS)
        raise InvalidImageError(f"This is not an image that can be read ({known}).", param=param) from error


def _read_shown_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return shown_size(image)
