"""Detects the format of a document from its content. Pure."""

from __future__ import annotations

import re
from enum import StrEnum

from serving.errors import InvalidRequestError

HEAD_BYTES = 8192
"""How much of a document's beginning is needed to detect its format."""
_PDF_OBJECT = re.compile(rb"\s*(%[^\r\n]*\s+)?\d{1,7} \d{1,5} obj\b")
"""What a PDF begins with that has lost its header."""


class DocumentFormat(StrEnum):
    PDF = "pdf"
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    TIFF = "tiff"
    GIF = "gif"
    BMP = "bmp"
    JP2 = "jp2"
    AVIF = "avif"
    HEIC = "heic"


_SIGNATURES = (
    (b"\xff\xd8\xff", DocumentFormat.JPEG),
    (b"\x89PNG\r\n\x1a\n", DocumentFormat.PNG),
    (b"II*\x00", DocumentFormat.TIFF),
    (b"MM\x00*", DocumentFormat.TIFF),
    (b"II+\x00", DocumentFormat.TIFF),
    (b"MM\x00+", DocumentFormat.TIFF),
    (b"GIF87a", DocumentFormat.GIF),
    (b"GIF89a", DocumentFormat.GIF),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", DocumentFormat.JP2),
    (b"\xff\x4f\xff\x51", DocumentFormat.JP2),
)
_BRANDS = {
    b"avif": DocumentFormat.AVIF,
    b"avis": DocumentFormat.AVIF,
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), DocumentFormat.HEIC),
}
"""Brands of the ISO base media file format; `mif1` alone may be either, and its compatible brands decide."""
_ARCHIVE = b"PK\x03\x04"
_OFFICE = (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf")
_OFFICE_PARTS = (b"[Content_Types].xml", b"word/", b"xl/", b"ppt/", b"application/vnd.oasis.opendocument")
_OTHERS = (
    (_ARCHIVE, "a ZIP archive; unpack it and send the documents in it"),
    (b"Rar!", "a RAR archive; unpack it and send the documents in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it and send the documents in it"),
    (b"\x1f\x8b", "gzip-compressed data; unpack it first"),
    (b"%!PS", "PostScript; convert it to PDF with ps2pdf"),
    (b"AT&TFORM", "DjVu; convert it to PDF with ddjvu -format=pdf"),
    (b"8BPS", "a Photoshop document; export it as PNG or PDF"),
    (b"\x00\x00\x01\x00", "an icon; save it as PNG"),
    (b"\xff\x0a", "JPEG XL; save it as PNG or JPEG"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL; save it as PNG or JPEG"),
    (b"ID3", "audio"),
    (b"OggS", "audio or video"),
)
_MARKUP = (
    (b"<svg", "an SVG drawing; convert it to PDF or PNG"),
    (b"<!doctype html", "a web page; print it to PDF"),
    (b"<html", "a web page; print it to PDF"),
    (b"<?xml", "XML"),
)
_KNOWN = "PDF, JPEG, PNG, WebP, TIFF, GIF, BMP, JPEG 2000, AVIF and HEIC"


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
    if head[4:8] == b"ftyp" and (pictured := _find_brand(head)) is not None:
        return pictured
    is_archive = head.startswith(_ARCHIVE)
    if head.startswith(_OFFICE) or (is_archive and any(part in head for part in _OFFICE_PARTS)):
        raise InvalidRequestError(
            "Office documents are not supported; turn the document into a PDF, for example with LibreOffice"
            " (soffice --convert-to pdf FILE), and send that.",
            param=param,
            code="unsupported_document",
        )
    # Bytes 6 to 9 of a bitmap are reserved and always zero; "BM" alone starts many texts.
    if head[:2] == b"BM" and head[6:10] == b"\x00\x00\x00\x00":
        return DocumentFormat.BMP
    if not is_archive and (b"%PDF-" in head or _PDF_OBJECT.match(head)):
        return DocumentFormat.PDF
    name, _, advice = _name(head).partition("; ")
    what_to_do = f"{advice} (supported are {_KNOWN})" if advice else f"send one of {_KNOWN}"
    raise InvalidRequestError(
        f"The document is {name}, which is not supported; {what_to_do}.", param=param, code="unsupported_document"
    )


def _find_brand(head: bytes) -> DocumentFormat | None:
    """The format of an image in an ISO base media file; None for videos and others."""
    size = min(int.from_bytes(head[:4], "big"), 256)
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, size, 4))]
    found = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    return DocumentFormat.AVIF if DocumentFormat.AVIF in found else found[0] if found else None


def _name(head: bytes) -> str:
    """What a file is that cannot be read, and after a semicolon what its sender can do."""
    for signature, name in _OTHERS:
        if head.startswith(signature):
            return name
    if head[4:8] == b"ftyp":
        return "a video"
    lowered = head[:1024].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for start, name in _MARKUP:
        if lowered.startswith(start):
            return name
    if head and b"\x00" not in head:
        try:
            head[:-4].decode()
        except UnicodeDecodeError:
            pass
        else:
            return "plain text, which needs no reading"
    return "of an unknown format"
