"""Draws images: every format is turned as displayed, in 8 bits, with square pixels, and small enough to be read.

Files that have lost their end are read as far as they go, as image viewers do, and the page says so.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageFile

from serving.ocr.rendering.drawing import WHITE, Drawing, PageError, WarningKind, fit_scale
from serving.plugin.images.geometry import shown_size
from serving.plugin.images.picture import show
from serving.plugin.images.repairs import repair

_PILLOW_FORMATS = {
    "jpeg": ("JPEG",),
    "png": ("PNG",),
    "webp": ("WEBP",),
    "tiff": ("TIFF",),
    "gif": ("GIF",),
    "bmp": ("BMP",),
    "jp2": ("JPEG2000",),
    "avif": ("AVIF",),
    "heic": ("HEIF",),
}
_AS_THEY_ARE = frozenset({"jpeg", "png", "webp"})
"""Image formats that are passed on unchanged when the image needs no rotation, cropping or repair."""
_NARROW_MODES = frozenset({"1", "L"})
"""Modes that Pillow decodes to one byte per pixel; others take four, and four more when they are converted."""
_MEMORY_SHARE = 0.6
"""The part of a worker's memory that decoding may take."""
_BLACK_WHEN_MISSING = frozenset({"1", "L", "LA", "RGB", "RGBA", "I;16", "I"})
"""Modes in which rows that were not decoded are black."""
_JPEG = b"\xff\xd8\xff"
_LOST = "The file is damaged or incomplete; it was read as far as it could be decoded{}."

Result = TypeVar("Result")


def count_pages(file: Path, name: str) -> int:
    """The number of pages of an image; only those of a TIFF count, not the frames of an animation.

    Raises:
        Exception: the image cannot be opened; Pillow's readers raise anything.
    """

    def count(data: bytes) -> int:
        with _opened(data, name) as image:
            return int(getattr(image, "n_frames", 1)) if name == "tiff" else 1

    return _read(file, count)[0]


def draw(file: Path, name: str, page: int, max_pixels: int, memory_bytes: int, *, is_part: bool) -> Drawing:
    """Draw one page.

    Args:
        file: the document.
        name: its format.
        page: counted from 0.
        max_pixels: larger images are shrunk.
        memory_bytes: of this process; images that cannot be decoded within it are refused.
        is_part: whether only a part of it is needed, so that the file cannot be passed on as it is.

    Raises:
        PageError: the image is too large to be decoded.
        Exception: it is damaged; Pillow's readers raise anything.
    """

    def decode(data: bytes) -> Drawing:
        with _opened(data, name) as opened:
            if name == "tiff":
                opened.seek(page)
            size = shown_size(opened)
            if size[0] * size[1] > max_pixels:
                return _draw_smaller(opened, size, max_pixels, memory_bytes)
            if name in _AS_THEY_ARE and _is_plain(opened) and size == opened.size and not is_part:
                opened.load()  # damage should be found here, not in the engine
                return Drawing(opened, data, f"image/{name}")
            return Drawing(show(opened, WHITE))

    drawing, loss = _read(file, decode)
    if loss is not None:
        drawing.warn(WarningKind.DAMAGED, _LOST.format(loss))
    return drawing


def _read(file: Path, read: Callable[[bytes], Result]) -> tuple[Result, str | None]:
    """Call `read` on the file, or on as much of it as can be read.

    Returns:
        The result, and what to tell about the loss; None if nothing was lost.
    """
    data = file.read_bytes()
    try:
        return read(data), None
    except (PageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers may raise anything
        repaired = repair(data)
        if repaired is not None:
            with contextlib.suppress(Exception):
                return read(repaired), "" if data.startswith(_JPEG) else None
        try:
            with _tolerating():
                found = read(repaired if repaired is not None and not data.startswith(_JPEG) else data)
        except (PageError, MemoryError):
            raise
        except Exception:  # noqa: BLE001  the first error says more
            raise error from None
        loss = _fill_lost_rows(found) if isinstance(found, Drawing) else ""
        if loss is None:
            raise
        return found, loss


@contextlib.contextmanager
def _tolerating() -> Iterator[None]:
    """Let Pillow keep what it has decoded when a file ends early."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _fill_lost_rows(drawing: Drawing) -> str | None:
    """Make rows at the end that were not decoded white; returns how much they are, or None if nothing was decoded."""
    image, drawing.file = drawing.image, None
    if image.mode not in _BLACK_WHEN_MISSING:
        return ""
    box = (image if image.mode in ("1", "L", "I", "I;16") else image.convert("RGB")).getbbox()
    if box is None:
        return None
    num_lost = image.height - box[3]
    if num_lost:
        drawing.image = image.convert("RGB")
        drawing.image.paste(WHITE, (0, box[3], image.width, image.height))
    part = num_lost / image.height
    return f", and the last {part:.0%} of its height is missing" if part >= 0.01 else ""


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    if name == "heic":
        import pillow_heif  # registers itself in this process only

        pillow_heif.register_heif_opener()
    with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS[name]) as image:
        yield image


def _draw_smaller(image: Image.Image, size: tuple[int, int], max_pixels: int, memory_bytes: int) -> Drawing:
    """Draw an image with more pixels than a page may have; JPEGs are decoded at a smaller size right away.

    Raises:
        PageError: the image cannot be decoded within the worker's memory.
    """
    scale = fit_scale(*size, max_pixels)
    if image.format == "JPEG":
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    needed = image.width * image.height * (1 if image.mode in _NARROW_MODES else 8)
    if needed > memory_bytes * _MEMORY_SHARE:
        side = math.isqrt(max_pixels)
        raise PageError(
            "page_too_large",
            f"The image has {size[0]} x {size[1]} pixels and cannot be decoded within this service's memory; scale it"
            f" down to at most {max_pixels} pixels (such as {side} x {side}), or cut it into several images.",
        )
    left = shown_size(image)
    shown = show(image, WHITE, max(1, math.isqrt(left[0] * left[1] // max_pixels)))
    target = (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))
    drawing = Drawing(shown.resize(target, Image.Resampling.LANCZOS) if shown.size != target else shown)
    drawing.warn(
        WarningKind.RESOLUTION_REDUCED,
        f"The image has {size[0]} x {size[1]} pixels, more than the {max_pixels} that a page may have; it was read at"
        f" {target[0]} x {target[1]}.",
    )
    return drawing


def _is_plain(image: Image.Image) -> bool:
    """Whether an image has a single frame that needs no rotation."""
    return int(getattr(image, "n_frames", 1)) == 1 and image.getexif().get(0x0112, 1) == 1
