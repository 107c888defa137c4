"""What a document is, told by its content. Pure."""

from __future__ import annotations

from enum import StrEnum

from serving.errors import InvalidRequestError

HEAD_BYTES = 4096
"""So much of a document's beginning says what it is."""
_PDF_WITHIN = 1024
"""Readers of PDF take a header that begins so late (ISO 32000-1, annex H.3, note 13)."""


class DocumentFormat(StrEnum):
    PDF = "pdf"
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    TIFF = "tiff"
    GIF = "gif"
    BMP = "bmp"


_SIGNATURES = (
    (b"\xff\xd8\xff", DocumentFormat.JPEG),
    (b"\x89PNG\r\n\x1a\n", DocumentFormat.PNG),
    (b"II*\x00", DocumentFormat.TIFF),
    (b"MM\x00*", DocumentFormat.TIFF),
    (b"II+\x00", DocumentFormat.TIFF),
    (b"MM\x00+", DocumentFormat.TIFF),
    (b"GIF87a", DocumentFormat.GIF),
    (b"GIF89a", DocumentFormat.GIF),
)
_ARCHIVE = b"PK\x03\x04"
_OFFICE = (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf")
_OFFICE_PARTS = (b"[Content_Types].xml", b"word/", b"xl/", b"ppt/", b"application/vnd.oasis.opendocument")
_KNOWN = "PDF, JPEG, PNG, WebP, TIFF, GIF and BMP"


def find_format(head: bytes, param: str | None = "document") -> DocumentFormat:
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
        return DocumentFormat.WEBP
    is_archive = head.startswith(_ARCHIVE)
    if head.startswith(_OFFICE) or (is_archive and any(part in head for part in _OFFICE_PARTS)):
        raise InvalidRequestError(
            "Office documents are not read; save the document as PDF and send that.",
            param=param,
            code="unsupported_document",
        )
    # Bytes 6 to 9 of a bitmap are reserved, and zero in every one; "BM" alone begins many a text.
    if head[:2] == b"BM" and head[6:10] == b"\x00\x00\x00\x00":
        return DocumentFormat.BMP
    if not is_archive and b"%PDF-" in head[: _PDF_WITHIN + len(b"%PDF-")]:
        return DocumentFormat.PDF
    raise InvalidRequestError(
        f"This is no document that can be read ({_KNOWN}).", param=param, code="unsupported_document"
    )
