"""Documents as people send them, and as nobody should."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pypdfium2
from PIL import Image

A4 = (595, 842)
"""In points."""


def write_pdf(file: Path, num_pages: int, size: tuple[float, float] = A4) -> Path:
    """Blank pages."""
    document = pypdfium2.PdfDocument.new()
    for _ in range(num_pages):
        document.new_page(*size).close()
    document.save(file)
    document.close()
    return file


def write_image(
    file: Path, name: str, size: tuple[int, int] = (60, 40), mode: str = "RGB", num_frames: int = 1
) -> Path:
    frames = [Image.new(mode, size, index) for index in range(num_frames)]
    more = {"save_all": True, "append_images": frames[1:]} if num_frames > 1 else {}
    frames[0].save(file, name, **more)
    return file


def encrypted_pdf() -> bytes:
    """One whose user password is not empty: its check value fits no password."""
    body = b"%PDF-1.4\n"
    objects = (
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]>>",
        b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"11" * 32 + b">/U<" + b"22" * 32 + b">>>",
    )
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj%bendobj\n" % (number, content)
    table = b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    ids = b"[<" + b"33" * 16 + b"><" + b"33" * 16 + b">]"
    trailer = b"trailer<</Size 5/Root 1 0 R/Encrypt 4 0 R/ID" + ids + b">>\nstartxref\n%d\n%%%%EOF" % len(body)
    return body + table + trailer


def huge_png(side: int) -> bytes:
    """Says that it is so large, and has few bytes."""

    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"\0" * 99)) + block(b"IEND", b"")
    )


def office_file() -> bytes:
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", "<w/>")
    return buffer.getvalue()
