"""Decodes request bodies that were compressed (RFC 9110, section 8.4), within the limit on decoded bytes. Pure.

Only whole bodies are decoded, and never beyond the limit: a kilobyte may unpack to a gigabyte.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from serving.errors import BodyTooLargeError, InvalidRequestError, UnsupportedCodingError

_Inflate = Callable[[bytes, int], bytes]
"""Returns at most so many bytes of the decoded body."""
_GZIP = 16 + zlib.MAX_WBITS
_IDENTITY = (b"", b"identity")


def decode_body(body: bytes, coding: bytes, max_bytes: int) -> bytes:
    """The body as it was before it was compressed.

    Args:
        body: as received.
        coding: the value of `Content-Encoding`.
        max_bytes: the most that the decoded body may have.

    Raises:
        UnsupportedCodingError: the coding is none of gzip, deflate and zstd, or there are several.
        InvalidRequestError: the body is not what its coding says.
        BodyTooLargeError: the decoded body is larger than allowed.
    """
    name = coding.strip().lower()
    if name in _IDENTITY:
        return body
    inflate = _INFLATES.get(name)
    if inflate is None:
        shown = name[:50].decode("latin-1")
        raise UnsupportedCodingError(f"Content-Encoding {shown} is not supported; use gzip, deflate, zstd or none.")
    try:
        decoded = inflate(body, max_bytes + 1)
    except (zlib.error, EOFError, ValueError) as error:
        raise InvalidRequestError(
            f"The body is not valid {name.decode('latin-1')}.", param="content-encoding", code="invalid_encoding"
        ) from error
    if len(decoded) > max_bytes:
        raise BodyTooLargeError(f"The body may be {max_bytes} bytes at most, decoded.")
    return decoded


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    """All members of a gzip file, one after the other."""
    parts: list[bytes] = []
    left = max_bytes
    while body and left > 0:
        part, body = _inflate_one(body, _GZIP, left)
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """`deflate` is zlib's format (RFC 9110, section 8.4.1.2); some clients send the bare data."""
    try:
        return _inflate_one(body, zlib.MAX_WBITS, max_bytes)[0]
    except zlib.error:
        return _inflate_one(body, -zlib.MAX_WBITS, max_bytes)[0]


def _inflate_one(body: bytes, window_bits: int, max_bytes: int) -> tuple[bytes, bytes]:
    """One compressed stream, and what follows it."""
    decoder = zlib.decompressobj(window_bits)
    decoded = decoder.decompress(body, max_bytes)
    if not decoder.eof and len(decoded) < max_bytes:
        raise EOFError
    return decoded, decoder.unused_data


def _unpack_zstd(body: bytes, max_bytes: int) -> bytes:
    """Of a body that is cut short, what there is: whoever reads it finds that it is not whole."""
    import zstandard  # few clients use it

    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body, read_across_frames=True) as reader:
            return reader.read(max_bytes)
    except zstandard.ZstdError as error:
        raise ValueError("not zstd") from error


_INFLATES: dict[bytes, _Inflate] = {
    b"gzip": _gunzip,
    b"x-gzip": _gunzip,
    b"deflate": _inflate,
    b"zstd": _unpack_zstd,
}
