"""Pictures with two resolutions: shown with square pixels, and as large to the router as to the engine."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.image_files import encode, scene, with_orientation

from serving.ocr.rendering.worker import draw
from serving.plugin.images.decoding import decode, read_header, size_of
from serving.plugin.images.page_views import WHITE
from serving.plugin.modes.selection import ModeRules
from serving.router.request.image_headers import read_size

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
SIZE = (60, 40)
Dots = tuple[float, float]


def jpeg_with_ratio(picture: Image.Image, dots: Dots) -> bytes:
    """JFIF's other way: a ratio without a unit."""
    data = bytearray(encode(picture, "JPEG", dpi=(72, 72)))
    at = data.index(b"JFIF\0") + 7
    data[at : at + 5] = struct.pack(">BHH", 0, int(dots[0]), int(dots[1]))
    return bytes(data)


def png_with_ratio(picture: Image.Image, dots: Dots) -> bytes:
    """pHYs without a unit."""
    data = encode(picture, "PNG")
    chunk = b"pHYs" + struct.pack(">IIB", int(dots[0]), int(dots[1]), 0)
    return data[:33] + struct.pack(">I", 9) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def tiff_with_ratio(picture: Image.Image, dots: Dots) -> bytes:
    return encode(picture, "TIFF", x_resolution=dots[0], y_resolution=dots[1], resolution_unit=1)


WRITERS: dict[str, Callable[[Image.Image, Dots], bytes]] = {
    "tiff": lambda picture, dots: encode(picture, "TIFF", dpi=dots),
    "tiff, fax": lambda picture, dots: encode(picture.convert("1"), "TIFF", dpi=dots, compression="group3"),
    "tiff, metric": lambda picture, dots: encode(
        picture, "TIFF", x_resolution=dots[0] / 2.54, y_resolution=dots[1] / 2.54, resolution_unit="cm"
    ),
    "tiff, ratio": tiff_with_ratio,
    "png": lambda picture, dots: encode(picture, "PNG", dpi=dots),
    "png, ratio": png_with_ratio,
    "jpeg": lambda picture, dots: encode(picture, "JPEG", dpi=dots),
    "jpeg, ratio": jpeg_with_ratio,
    "bmp": lambda picture, dots: encode(picture, "BMP", dpi=dots),
}


def sizes_of(data: bytes) -> set[tuple[int, int]]:
    """As all who look at a picture see it; the router does not take bitmaps."""
    found = {read_header(data, FORMATS).size, size_of(decode(data, FORMATS, WHITE))}
    return found if data.startswith(b"BM") else found | {read_size(data, "image")}


def draw_bytes(folder: Path, data: bytes, max_pixels: int = 10**6) -> tuple[bytes, dict[str, Any]]:
    """The picture that goes to the model for a document of one page, and what is told of it."""
    file = folder / "document"
    file.write_bytes(data)
    name = {0x89: "png", 0xFF: "jpeg", 0x42: "bmp"}.get(data[0], "tiff")
    return draw({"file": str(file), "format": name, "page": 0, "dpi": 144, "max_pixels": max_pixels})


def draw_file(folder: Path, data: bytes, max_pixels: int = 10**6) -> Image.Image:
    drawn, told = draw_bytes(folder, data, max_pixels)
    page = Image.open(io.BytesIO(drawn))
    assert (told["width"], told["height"]) == page.size
    assert sizes_of(drawn) == {page.size}, "it would be stretched once more"
    return page


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("dots", "size"), [((204, 98), (60, 83)), ((204, 196), (60, 42)), ((100, 400), (240, 40)), ((150, 300), (120, 40))]
)
def test_the_coarser_side_gets_more_pixels(name: str, dots: Dots, size: tuple[int, int], tmp_path: Path) -> None:
    data = WRITERS[name](scene(*SIZE), dots)
    assert sizes_of(data) == {size}
    assert draw_file(tmp_path, data).size == size


def test_a_picture_is_stretched_and_not_cut_or_padded(tmp_path: Path) -> None:
    left = np.zeros((40, 60, 3), np.uint8)
    left[:, :30] = 200
    left[:20] += 50
    for data in (encode(Image.fromarray(left), name, dpi=(200, 100), quality=100) for name in ("PNG", "JPEG", "TIFF")):
        for shown in (np.asarray(decode(data, FORMATS, WHITE)), np.asarray(draw_file(tmp_path, data))):
            corners = [int(shown[y, x, 0]) for y in (5, 75) for x in (5, 55)]
            assert np.abs(np.array(corners) - [250, 50, 200, 0]).max() <= 3


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dots", [(300, 300), (72, 72), (600, 598), (1, 1)])
def test_square_pixels_stay_as_they_are(name: str, dots: Dots, tmp_path: Path) -> None:
    data, plain = WRITERS[name](scene(*SIZE), dots), WRITERS[name](scene(*SIZE), (200, 200))
    assert sizes_of(data) == {SIZE}
    assert np.array_equal(np.asarray(decode(data, FORMATS, WHITE)), np.asarray(decode(plain, FORMATS, WHITE)))
    if name.startswith(("png", "jpeg")):
        assert draw_bytes(tmp_path, data)[0] == data


@pytest.mark.parametrize("name", ["tiff, ratio", "png, ratio", "jpeg, ratio"])
@pytest.mark.parametrize("dots", [(0, 0), (0, 300), (300, 0), (500, 100), (1, 300), (65000, 72)])
def test_what_cannot_be_true_is_not_followed(name: str, dots: Dots, tmp_path: Path) -> None:
    data = WRITERS[name](scene(*SIZE), dots)
    assert sizes_of(data) == {SIZE}
    assert draw_file(tmp_path, data).size == SIZE


def test_resolutions_that_are_no_numbers_are_not_followed() -> None:
    data = bytearray(encode(scene(*SIZE), "TIFF", dpi=(204, 98)))
    at = data.index(struct.pack("<II", 204, 1))
    for numbers in ((0, 0), (0xFFFFFFFF, 0), (0, 7)):
        data[at : at + 8] = struct.pack("<II", *numbers)
        assert sizes_of(bytes(data)) == {SIZE}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_a_turned_picture_is_made_square_along_the_side_that_it_was_scanned_by(
    name: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(*SIZE), name, exif=exif, dpi=(200, 100))
    size = (60, 80) if orientation < 5 else (80, 60)
    assert sizes_of(data) == {size}
    assert draw_file(tmp_path, data).size == size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "WEBP", "TIFF", "PNG"])
def test_the_router_sees_a_turned_picture_as_the_engine_does(name: str, orientation: int) -> None:
    data = with_orientation(scene(*SIZE), orientation, name)
    assert read_size(data, "image") == size_of(decode(data, FORMATS, WHITE))


def test_tokens_and_modes_are_those_of_the_size_that_is_shown() -> None:
    """A fax of an A4 page: 1728 x 1145 pixels as it is, 1728 x 2383 as it should be."""
    data = encode(Image.new("1", (1728, 1145), 1), "TIFF", compression="group4", dpi=(204, 98))
    assert sizes_of(data) == {(1728, 2383)}
    (chosen,) = ModeRules.from_config({}).choose({"mode": "gundam"}, {}, [read_size(data, "image")])
    grid = chosen.mode.tile_grid(*read_header(data, FORMATS).size)
    assert (grid.columns, grid.rows) == (2, 3)


def test_the_limit_of_pixels_is_for_the_picture_that_is_shown(tmp_path: Path) -> None:
    data = encode(scene(*SIZE), "PNG", dpi=(400, 100))
    draw_file(tmp_path, data, max_pixels=60 * 160)
    assert draw_file(tmp_path, data, max_pixels=60 * 160 - 1).size == (59, 158)


@given(st.tuples(st.integers(1, 70), st.integers(1, 70)), st.tuples(st.integers(0, 500), st.integers(0, 500)))
def test_all_who_look_at_a_picture_see_one_size(size: tuple[int, int], dots: tuple[int, int]) -> None:
    (found,) = sizes_of(png_with_ratio(Image.new("L", size), dots))
    assert found[0] >= size[0]
    assert found[1] >= size[1]
