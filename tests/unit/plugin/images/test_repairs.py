"""Pictures that Pillow refuses for a part that can be spared: read all the same, everywhere."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.image_files import encode, scene

from serving.errors import InvalidImageError
from serving.ocr.rendering.worker import count_pages, draw
from serving.plugin.images.decoding import DecodeError, decode, read_header
from serving.plugin.images.page_views import WHITE
from serving.plugin.images.repairs import repair
from serving.router.request.image_headers import read_size

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
    assert repair(data) == PLAIN
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
    bare = repair(data[:length])
    assert bare is None or len(bare) < length


def test_what_is_no_png_is_left_alone() -> None:
    assert repair(encode(PICTURE, "JPEG")) is None
    assert repair(PLAIN) is None
    assert repair(b"") is None


LETTER = scene(400, 640)
JPEGS = {
    "baseline": encode(LETTER, "JPEG", quality=80),
    "4:4:4": encode(LETTER, "JPEG", quality=80, subsampling=0),
    "grey": encode(LETTER.convert("L"), "JPEG", quality=80),
    "progressive": encode(LETTER, "JPEG", quality=80, progressive=True),
    "grey progressive": encode(LETTER.convert("L"), "JPEG", quality=80, progressive=True),
}


def draw_jpeg(folder: Path, data: bytes) -> Image.Image:
    """As a document's page, which may say that it is damaged."""
    file = folder / "document"
    file.write_bytes(data)
    assert count_pages(file, "jpeg") == 1
    drawn, told = draw({"file": str(file), "format": "jpeg", "page": 0, "dpi": 144, "max_pixels": 10**6})
    page = Image.open(io.BytesIO(drawn))
    page.load()
    assert page.size == (told["width"], told["height"])
    assert [kind for kind, _ in told["warnings"]] == ["damaged"]
    return page.convert("RGB")


@pytest.mark.parametrize("num_lost", [1, 2, 3, 8, 60])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_its_last_bytes_is_read(name: str, num_lost: int, tmp_path: Path) -> None:
    whole, cut = JPEGS[name], JPEGS[name][:-num_lost]
    assert read_header(cut, FORMATS).size == read_size(cut, "image") == LETTER.size
    expected = np.asarray(decode(whole, FORMATS, WHITE)).astype(int)
    for page in (decode(cut, FORMATS, WHITE), draw_jpeg(tmp_path, cut)):
        differences = np.abs(np.asarray(page).astype(int) - expected)
        if "progressive" in name:
            assert differences.mean() < 4
        else:
            assert differences[:-32].max() <= 3
            assert differences.max() > 0 or num_lost <= 3


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_has_lost_much_is_refused(name: str, part: float, tmp_path: Path) -> None:
    if "progressive" in name and part > 0.6:
        part = 0.5  # the last scans are long, and refine what is there
    cut = JPEGS[name][: int(len(JPEGS[name]) * part)]
    with pytest.raises(DecodeError):  # a chat request's answer has no place for a warning
        decode(cut, FORMATS, WHITE)
    if part > 0.02:
        assert draw_jpeg(tmp_path, cut).size == LETTER.size


@given(
    st.sampled_from(sorted(JPEGS)),
    st.integers(0, 400),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3))),
)
def test_no_damage_is_too_odd(name: str, num_lost: int, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(JPEGS[name][: len(JPEGS[name]) - num_lost])
    for at, values in changes:
        data[at % len(data) : at % len(data) + len(values)] = values
    with contextlib.suppress(DecodeError):
        assert decode(bytes(data), FORMATS, WHITE) is not None
