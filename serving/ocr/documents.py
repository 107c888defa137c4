"""What a document is, told by its content, and which of its pages are meant. Pure."""

from __future__ import annotations

import re
from enum import StrEnum

from serving.errors import InvalidRequestError

HEAD_BYTES = 4096
"""So much of a document's beginning says what it is."""
_PDF_WITHIN = 1024
"""Readers of PDF take a header that begins so late (ISO 32000-1, annex H.3, note 13)."""
_MAX_SELECTION_CHARS = 4096
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")


class Format(StrEnum):
    PDF = "pdf"
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    TIFF = "tiff"
    GIF = "gif"
    BMP = "bmp"


_SIGNATURES = (
    (b"\xff\xd8\xff", Format.JPEG),
    (b"\x89PNG\r\n\x1a\n", Format.PNG),
    (b"II*\x00", Format.TIFF),
    (b"MM\x00*", Format.TIFF),
    (b"II+\x00", Format.TIFF),
    (b"MM\x00+", Format.TIFF),
    (b"GIF87a", Format.GIF),
    (b"GIF89a", Format.GIF),
)
_ARCHIVE = b"PK\x03\x04"
_OFFICE = (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf")
_OFFICE_PARTS = (b"[Content_Types].xml", b"word/", b"xl/", b"ppt/", b"application/vnd.oasis.opendocument")
_KNOWN = "PDF, JPEG, PNG, WebP, TIFF, GIF and BMP"


def find_format(head: bytes, param: str | None = "document") -> Format:
    """The format of a document; what its name or media type claims does not matter.

    The first bytes decide before anything further in, so that a file that is two things at once is one here.

    Args:
        head: its first `HEAD_BYTES`, or all of it.
        param: the field it came in, for the error.

    Raises:
        InvalidRequestError: a format that is not read, with a word of advice for Office files.
    """
    for signature, found in _SIGNATURES:
        if head.startswith(signature):
            return found
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Format.WEBP
    is_archive = head.startswith(_ARCHIVE)
    if head.startswith(_OFFICE) or (is_archive and any(part in head for part in _OFFICE_PARTS)):
        raise InvalidRequestError(
            "Office documents are not read; save the document as PDF and send that.",
            param=param,
            code="unsupported_document",
        )
    # Bytes 6 to 9 of a bitmap are reserved, and zero in every one; "BM" alone begins many a text.
    if head[:2] == b"BM" and head[6:10] == b"\x00\x00\x00\x00":
        return Format.BMP
    if not is_archive and b"%PDF-" in head[: _PDF_WITHIN + len(b"%PDF-")]:
        return Format.PDF
    raise InvalidRequestError(
        f"This is no document that can be read ({_KNOWN}).", param=param, code="unsupported_document"
    )


def select_pages(selection: str | None, num_pages: int, max_pages: int) -> list[int]:
    """Pages that are meant, counted from 0, in the document's order and each once.

    Args:
        selection: `1-3,7`, counted from 1 as people do; None for all of them.
        num_pages: that the document has.
        max_pages: that may be read of one document.

    Raises:
        InvalidRequestError: it cannot be understood, names pages that there are not, or too many.
    """
    if selection is None:
        ranges = [(1, num_pages)]
    elif len(selection) > _MAX_SELECTION_CHARS:
        raise _refuse(f"pages may be {_MAX_SELECTION_CHARS} characters long at most.")
    else:
        ranges = [_read_range(part, num_pages) for part in selection.split(",")]
    # Bounded by the document's length, whatever overlaps.
    if num_pages > max_pages and sum(last - first + 1 for first, last in _merge(ranges)) > max_pages:
        raise _refuse(
            f"The document has {num_pages} pages and {max_pages} may be read at once; choose some with pages."
        )
    return [page - 1 for first, last in _merge(ranges) for page in range(first, last + 1)]


def _read_range(part: str, num_pages: int) -> tuple[int, int]:
    found = _RANGE.fullmatch(part)
    if found is None:
        raise _refuse("pages must be numbers and ranges with commas between, such as 1-3,7.")
    first = int(found.group(1))
    last = int(found.group(2) or first)
    if not 1 <= first <= last:
        raise _refuse("pages are counted from 1, and ranges go upwards.")
    if last > num_pages:
        raise _refuse(f"There is no page {last}: the document has {num_pages}.")
    return first, last


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _refuse(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="pages", code="invalid_pages")
