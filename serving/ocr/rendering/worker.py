"""The process that opens untrusted documents and renders their pages.

It has no secrets and writes no files, the kernel limits its memory, and it may be killed at any time. Requests arrive
on stdin as lines of JSON; each is answered on stdout by a line of JSON, followed by `size_bytes` of an image file. The
document's file is opened again for each page, so that nothing of it stays in memory.

    {"file": "/tmp/x", "format": "pdf"}                                             -> {"num_pages": 50}
    {"file": "/tmp/x", "format": "pdf", "page": 0, "dpi": 144, "max_pixels": 50000000}
        -> {"width": 1190, "height": 1684, "media_type": "image/png", "size_bytes": 81234}
    the same with "part": [left, top, right, bottom], in pixels of the page         -> only that part of it
    any request that fails                                                          -> {"code": ..., "message": ...}
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from serving.plugin.images.geometry import shown_size
from serving.plugin.images.picture import show, to_rgb
from serving.plugin.images.repairs import read_tolerantly

_POINTS_PER_INCH = 72
_PILLOW_FORMATS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "tiff": "TIFF", "gif": "GIF", "bmp": "BMP"}
_AS_THEY_ARE = frozenset({"jpeg", "png", "webp"})
"""Image formats that are passed on unchanged when the image needs no rotation or cropping."""
_REPAIRED = frozenset({"jpeg", "png"})
"""Formats in which minor damage is repaired."""
_LARGE_PNG_BYTES = 12 * 2**20
_JPEG_QUALITY = 95
_WHITE = (255, 255, 255)


class PageError(Exception):
    """A document or page that cannot be rendered; the message is for its owner."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """Answer requests until stdin ends."""
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Anything that a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # each request has its own limit
    for line in sys.stdin.buffer:
        answer(json.loads(line), answers)


def answer(request: dict[str, Any], answers: BinaryIO) -> None:
    """Carry out a request and write the answer."""
    picture = b""
    reply: dict[str, Any]
    try:
        if "page" in request:
            picture, reply = draw(request)
            reply["size_bytes"] = len(picture)
        else:
            reply = {"num_pages": count_pages(Path(request["file"]), request["format"])}
    except PageError as error:
        reply = {"code": error.code, "message": str(error)}
    except MemoryError:
        reply = {"code": "page_too_large", "message": "The page needs more memory than rendering may use; lower dpi."}
    except Exception:  # noqa: BLE001  decoders raise anything on malformed files
        reply = {
            "code": "damaged_document",
            "message": "The document is damaged, or its content does not match its format.",
        }
    answers.write(json.dumps(reply).encode() + b"\n")
    answers.write(picture)
    answers.flush()


def count_pages(file: Path, name: str) -> int:
    """The number of pages; frames of a GIF or WebP do not count as pages.

    Raises:
        PageError: the document cannot be opened.
    """
    if name == "pdf":
        with open_pdf(file) as document:
            return len(document)
    if name in _REPAIRED:
        return read_tolerantly(lambda data: count_frames(io.BytesIO(data), name), file.read_bytes())
    return count_frames(file, name)


def count_frames(source: Path | io.BytesIO, name: str) -> int:
    """The number of frames that count as pages of an image."""
    with Image.open(source, formats=[_PILLOW_FORMATS[name]]) as image:
        return int(getattr(image, "n_frames", 1)) if name == "tiff" else 1


def draw(request: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Render one page: its image file, and the answer that describes it.

    Raises:
        PageError: the page cannot be rendered.
    """
    file, name = Path(request["file"]), request["format"]
    if name == "pdf":
        return encode_part(draw_pdf_page(file, request["page"], request["dpi"], request["max_pixels"]), request)
    if name in _REPAIRED:
        return read_tolerantly(lambda data: draw_picture(io.BytesIO(data), request), file.read_bytes())
    return draw_picture(file, request)


def draw_picture(source: Path | io.BytesIO, request: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """As `draw`, for images."""
    name = request["format"]
    with Image.open(source, formats=[_PILLOW_FORMATS[name]]) as opened:
        if name == "tiff":
            opened.seek(request["page"])
        size = shown_size(opened)
        check_pixels(*size, request["max_pixels"])
        if name in _AS_THEY_ARE and is_plain(opened) and size == opened.size and "part" not in request:
            opened.load()  # damage should be found here, not in the engine
            data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
            return data, describe(opened, f"image/{name}")
        return encode_part(show(opened, _WHITE), request)


def encode_part(image: Image.Image, request: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Encode a rendered page, or the requested part of it."""
    return encode(image.crop(request["part"]) if "part" in request else image)


def draw_pdf_page(file: Path, page: int, dpi: int, max_pixels: int) -> Image.Image:
    """Render a page of a PDF. Forms appear as filled in; scripts never run: this build of PDFium has no interpreter."""
    with open_pdf(file) as document:
        width, height = document.get_page_size(page)  # in points
        scale = dpi / _POINTS_PER_INCH
        if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
            raise PageError("damaged_page", "The page has no valid size.")
        check_pixels(math.ceil(width * scale), math.ceil(height * scale), max_pixels)
        document.init_forms()
        return to_rgb(document[page].render(scale=scale).to_pil(), _WHITE)


def open_pdf(file: Path) -> Any:
    """A context manager for an opened PDF.

    Raises:
        PageError: the PDF is encrypted or damaged.
    """
    import pypdfium2

    try:
        return contextlib.closing(pypdfium2.PdfDocument(file))
    except pypdfium2.PdfiumError as error:
        if error.err_code in (pypdfium2.raw.FPDF_ERR_PASSWORD, pypdfium2.raw.FPDF_ERR_SECURITY):
            raise PageError("encrypted_document", "The PDF is encrypted; send it without a password.") from error
        raise PageError("damaged_document", "The PDF is damaged.") from error


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse a page that is too large before memory is allocated for it."""
    if width * height > max_pixels:
        raise PageError(
            "page_too_large", f"The page has {width} x {height} pixels; at most {max_pixels} are allowed, lower dpi."
        )


def is_plain(image: Image.Image) -> bool:
    """Whether an image has a single frame that needs no rotation."""
    return int(getattr(image, "n_frames", 1)) == 1 and image.getexif().get(0x0112, 1) == 1


def encode(image: Image.Image) -> tuple[bytes, dict[str, Any]]:
    """Encode losslessly, unless the file would be very large, as for photographs."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    if buffer.tell() <= _LARGE_PNG_BYTES:
        return buffer.getvalue(), describe(image, "image/png")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), describe(image, "image/jpeg")


def describe(image: Image.Image, media_type: str) -> dict[str, Any]:
    """The answer for a page, beside its bytes."""
    return {"width": image.width, "height": image.height, "media_type": media_type}


if __name__ == "__main__":
    main()
