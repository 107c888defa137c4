"""Detects the format of a document from its content. Pure."""

from __future__ import annotations

from enum import StrEnum

from serving.errors import InvalidRequestError

HEAD_BYTES = 4096
"""How much of a document's beginning is needed to detect its format."""
_PDF_WITHIN = 1024
"""PDF readers accept a header within this many bytes (ISO 32000-1, annex H.3, note 13)."""


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
    """The format of a document, whatever its name or media type claims.

    The first bytes take precedence over later ones, so that a file that is valid in two formats has one here.

    Args:
        head: the document's first `HEAD_BYTES`, or all of it if shorter.
        param: the request field to name in the error.

    Raises:
        InvalidRequestError: the format is not supported; the message has advice for Office files.
    """
    for signature, found in _SIGNATURES:
        if head.startswith(signature):
            return found
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return DocumentFormat.WEBP
    is_archive = head.startswith(_ARCHIVE)
    if head.startswith(_OFFICE) or (is_archive and any(part in head for part in _OFFICE_PARTS)):
        raise InvalidRequestError(
            "Office documents are not supported; save the document as PDF and send that.",
            param=param,
            code="unsupported_document",
        )
    # Bytes 6 to 9 of a bitmap are reserved and always zero; "BM" alone starts many texts.
    if head[:2] == b"BM" and head[6:10] == b"\x00\x00\x00\x00":
        return DocumentFormat.BMP
    if not is_archive and b"%PDF-" in head[: _PDF_WITHIN + len(b"%PDF-")]:
        return DocumentFormat.PDF
    raise InvalidRequestError(
        f"The document's format is not supported; send one of {_KNOWN}.", param=param, code="unsupported_document"
    )
