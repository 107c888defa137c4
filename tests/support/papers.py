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


def slow_pdf(num_pages: int, num_marks: int = 10**4) -> bytes:
    """Pages that take long to draw, in a few hundred bytes: forms that hold ten forms that hold ten forms.

    A hundred thousand marks take a tenth of a second, and a million more than a second and 200 MB.
    """
    depth = len(str(num_marks)) - 2
    tens = b"/F Do " * 10
    held = b"/Resources<</XObject<</F %d 0 R>>>>"
    form = b"/Type/XObject/Subtype/Form/BBox[0 0 100 100]"
    first_page = 4 + depth
    kids = b" ".join(b"%d 0 R" % (first_page + number) for number in range(num_pages))
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]/Contents %d 0 R" % (first_page - 1) + held + b">>"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[" + kids + b"]/Count %d>>" % num_pages,
        _stream(b"0 0 m 9 9 l 5 1 l f", form),
        *(_stream(tens, form + held % (3 + level)) for level in range(depth - 1)),
        _stream(tens),
        *([page % (first_page - 2)] * num_pages),
    ]
    body, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj%b\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1)
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    return body + table + b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(places) + 1, len(body))


def _stream(data: bytes, more: bytes = b"") -> bytes:
    return b"<</Length %d%b>>stream\n%b\nendstream" % (len(data), more, data)


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
