from __future__ import annotations

import gzip
import zlib

import pytest
import zstandard

from serving.errors import BodyTooLargeError, InvalidRequestError, UnsupportedCodingError
from serving.http.content_codings import decode_body

BODY = b'{"model":"nano"}' * 100
RAW = zlib.compressobj(wbits=-15)
WAYS = [
    (b"gzip", gzip.compress(BODY, mtime=0)),
    (b" GZip ", gzip.compress(BODY[:100], mtime=0) + gzip.compress(BODY[100:], mtime=0)),
    (b"x-gzip", gzip.compress(BODY, mtime=0)),
    (b"deflate", zlib.compress(BODY)),
    (b"deflate", RAW.compress(BODY) + RAW.flush()),
    (b"zstd", zstandard.compress(BODY)),
    (b"zstd", zstandard.ZstdCompressor(write_content_size=False).compress(BODY)),
    (b"identity", BODY),
]


@pytest.mark.parametrize(("coding", "body"), WAYS)
def test_a_compressed_body_is_decoded(coding: bytes, body: bytes) -> None:
    assert decode_body(body, coding, len(BODY)) == BODY


@pytest.mark.parametrize(("coding", "body"), WAYS[:-1])
def test_no_more_than_allowed_is_decoded(coding: bytes, body: bytes) -> None:
    with pytest.raises(BodyTooLargeError):
        decode_body(body, coding, len(BODY) - 1)


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"zstd"])
@pytest.mark.parametrize("body", [BODY, b"\x1f\x8b", gzip.compress(BODY, mtime=0)[:-9] + b"x"])
def test_a_body_that_is_something_else_is_refused(coding: bytes, body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_body(body, coding, 10**6)
    assert caught.value.http_status == 400


@pytest.mark.parametrize("coding", [b"br", b"gzip, gzip", b"x" * 1000, b"\xff"])
def test_other_codings_are_refused_with_those_that_are_not(coding: bytes) -> None:
    with pytest.raises(UnsupportedCodingError) as caught:
        decode_body(BODY, coding, 10**6)
    assert caught.value.http_status == 415
    assert caught.value.headers["accept-encoding"] == "gzip, deflate, zstd"
    assert len(caught.value.message) < 200


def test_a_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50_000_000), 9)
    with pytest.raises(BodyTooLargeError):
        decode_body(bomb, b"gzip", 1000)
