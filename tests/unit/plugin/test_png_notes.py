"""PNGs with texts and profiles that Pillow takes for a danger: read all the same, everywhere."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.errors import InvalidImageError
from serving.ocr.render_process import count_pages, draw
from serving.plugin.decoding import DecodeError, decode, read_header
from serving.plugin.images import WHITE
from serving.plugin.png_notes import drop_notes
from serving.router.images import read_size
from unit.plugin.image_files import encode, scene

FORMATS = ("JPEG", "PNG")
PICTURE = scene(60, 40)
PLAIN = encode(PICTURE, "PNG")
LONG = zlib.compress(b"x" * (2 * 2**20))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


NOTES = {
    "compressed text": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
    "profile": chunk(b"iCCP", b"Profile\0\0" + LONG),
    "many texts": chunk(b"tEXt", b"Comment\0" + b"x" * 2**20) * 70,
    "text of an unknown compression": chunk(b"zTXt", b"Comment\0\7abc"),
}
AFTER_HEADER, BEFORE_END = 33, len(PLAIN) - 12


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("place", [AFTER_HEADER, BEFORE_END], ids=["before the pixels", "after them"])
def test_a_picture_is_read_whatever_is_noted_in_it(name: str, place: int, tmp_path: Path) -> None:
    if name == "profile" and place == BEFORE_END:
        place = AFTER_HEADER  # where alone a profile may stand
    data = PLAIN[:place] + NOTES[name] + PLAIN[place:]
    assert drop_notes(data) == PLAIN
    assert read_header(data, FORMATS).size == read_size(data, "image") == PICTURE.size
    assert np.array_equal(np.asarray(decode(data, FORMATS, WHITE)), np.asarray(PICTURE))
    file = tmp_path / "document"
    file.write_bytes(data)
    assert count_pages(file, "png") == 1
    drawn, _ = draw({"file": str(file), "format": "png", "page": 0, "dpi": 144, "max_pixels": 10**6})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(drawn))), np.asarray(PICTURE))


def test_notes_that_pillow_takes_cost_nothing() -> None:
    data = PLAIN[:AFTER_HEADER] + chunk(b"tEXt", b"Comment\0short") + PLAIN[AFTER_HEADER:]
    assert decode(data, FORMATS, WHITE).info["Comment"] == "short"  # type: ignore[union-attr]  # it was not left out


def test_a_damaged_picture_is_refused_with_and_without_notes() -> None:
    for notes in (b"", NOTES["compressed text"]):
        data = (PLAIN[:AFTER_HEADER] + notes + PLAIN[AFTER_HEADER:])[: -len(PLAIN) // 2]
        with pytest.raises(DecodeError):
            decode(data, FORMATS, WHITE)
    with pytest.raises(InvalidImageError):
        read_size(PLAIN[:20], "image")


@pytest.mark.parametrize("length", range(0, 200, 7))
def test_a_png_that_is_cut_anywhere_is_taken_apart_without_an_error(length: int) -> None:
    data = PLAIN[:AFTER_HEADER] + chunk(b"tEXt", b"Comment\0" + b"x" * 50) + PLAIN[AFTER_HEADER:]
    bare = drop_notes(data[:length])
    assert bare is None or len(bare) < length


def test_what_is_no_png_is_left_alone() -> None:
    assert drop_notes(encode(PICTURE, "JPEG")) is None
    assert drop_notes(PLAIN) is None
    assert drop_notes(b"") is None
