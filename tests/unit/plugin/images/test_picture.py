"""Every pixel format to RGB of 8 bits, by the two ways to the model, against sums in numpy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.image_files import encode, scene, tiff, with_alpha

from serving.ocr.rendering.worker import draw
from serving.plugin.images.decoding import decode, read_header
from serving.plugin.images.page_views import WHITE
from serving.plugin.images.picture import to_rgb

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
SHAPE = (23, 31)
Values = npt.NDArray[np.generic]
Grey = npt.NDArray[np.uint8]


def ramp(low: float, high: float, dtype: str) -> Values:
    """Evenly from the lowest in one corner to the highest in the other."""
    return np.linspace(low, high, SHAPE[0] * SHAPE[1]).reshape(SHAPE).astype(dtype)


def scaled(values: Values, black: float, white: float) -> Grey:
    part = (values.astype(np.float64) - black) / (white - black)
    return np.rint(np.clip(part, 0, 1) * 255).astype(np.uint8)


def read_in_chat(data: bytes) -> Grey:
    page = decode(data, FORMATS, WHITE)
    header = read_header(data, FORMATS)
    rgb = np.asarray(page)
    assert header.size == (rgb.shape[1], rgb.shape[0])
    return rgb


def read_in_document(data: bytes) -> Grey:
    """What is drawn of a document goes to the model as a picture of a chat request."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "document"
        file.write_bytes(data)
        name = {"\x89": "png", "\xff": "jpeg", "G": "gif", "B": "bmp", "R": "webp"}.get(chr(data[0]), "tiff")
        drawn, told = draw({"file": str(file), "format": name, "page": 0, "dpi": 144, "max_pixels": 10**8})
    rgb = read_in_chat(drawn)
    assert (told["width"], told["height"]) == (rgb.shape[1], rgb.shape[0])
    return rgb


WAYS = pytest.mark.parametrize("read", [read_in_chat, read_in_document], ids=["chat", "document"])
Read = Callable[[bytes], Grey]


def grey_of(rgb: Grey) -> Grey:
    assert (rgb == rgb[..., :1]).all(), "it is not grey"
    return rgb[..., 0]


DEEP: dict[str, tuple[Values, float, float]] = {
    # name: numbers, the one that is black, the one that is white
    "16 bits": (ramp(0, 65535, "u2"), 0, 65535),
    "16 bits, no black": (ramp(2000, 55905, "u2"), 0, 65535),
    "16 bits, a dim scan": (ramp(0, 30_000, "u2"), 0, 32767),
    "12 bits in 16": (ramp(0, 4095, "u2"), 0, 4095),
    "12 bits in 16, no white": (ramp(90, 4000, "u2"), 0, 4095),
    "10 bits in 16": (ramp(0, 1023, "u2"), 0, 1023),
    "8 bits in 16": (ramp(0, 255, "u2"), 0, 255),
    "5 bits in 16": (ramp(0, 30, "u2"), 0, 31),
    "16 bits, all black": (ramp(0, 0, "u2"), 0, 1),
    "16 bits, all white": (ramp(65535, 65535, "u2"), 0, 65535),
    "signed 16 bits": (ramp(0, 32767, "i2"), 0, 32767),
    "signed 16 bits, negative": (ramp(-1024, 3071, "i2"), -1024, 3071),
    "signed 16 bits, all the same": (ramp(-7, -7, "i2"), -7, 0),
    "signed 32 bits": (ramp(0, 2**31 - 1, "i4"), 0, 2**31 - 1),
    "signed 32 bits, negative": (ramp(-(2**31), 2**31 - 1, "i4"), -(2**31), 2**31 - 1),
    "32 bits": (ramp(0, 2**32 - 1, "u4"), 0, 2**32 - 1),
    "16 bits in 32": (ramp(0, 65535, "u4"), 0, 65535),
    "floats to 1": (ramp(0, 1, "f4"), 0, 1),
    "floats to 1, overshooting": (ramp(-0.05, 1.08, "f4"), 0, 1),
    "floats to 255": (ramp(0, 255, "f4"), 0, 255),
    "floats to 255, no white": (ramp(3, 220, "f4"), 0, 255),
    "floats, dim": (ramp(0, 0.02, "f4"), 0, float(np.float32(0.02))),
    "floats to 65535": (ramp(0, 65535, "f4"), 0, 65535),
    "floats, negative": (ramp(-800, 1200, "f4"), -800, 1200),
    "floats, all black": (ramp(0, 0, "f4"), 0, 1),
    "floats, all the same": (ramp(-3e38, -3e38, "f4"), float(np.float32(-3e38)), 0),
    "huge floats": (ramp(-3e38, 3e38, "f4"), float(np.float32(-3e38)), float(np.float32(3e38))),
}


@WAYS
@pytest.mark.parametrize(
    ("name", "order"),
    # Pillow does not read big-endian numbers of 32 bits without a sign.
    [(name, order) for name, (values, *_) in DEEP.items() for order in "<>" if (order, values.dtype) != (">", "u4")],
)
def test_more_than_8_bits_are_scaled_by_their_real_range(name: str, order: Literal["<", ">"], read: Read) -> None:
    values, black, white = DEEP[name]
    assert np.array_equal(grey_of(read(tiff(values, order))), scaled(values, black, white))


@WAYS
@pytest.mark.parametrize("name", [name for name, (values, *_) in DEEP.items() if values.dtype == np.uint16])
def test_a_png_of_16_bits_is_scaled_as_well(name: str, read: Read) -> None:
    values, black, white = DEEP[name]
    assert np.array_equal(grey_of(read(encode(Image.fromarray(values), "PNG"))), scaled(values, black, white))


@WAYS
@pytest.mark.parametrize(("dtype", "white"), [("u2", 65535), ("f4", 1)])
def test_where_white_is_zero_it_is_white(dtype: str, white: float, read: Read) -> None:
    values = ramp(0, white, dtype)
    assert np.array_equal(grey_of(read(tiff(values, photometric=0))), 255 - scaled(values, 0, white))


@WAYS
@pytest.mark.parametrize("photometric", [0, 1])
def test_what_is_no_number_is_white_and_what_has_no_end_is_cut(photometric: int, read: Read) -> None:
    values = ramp(0, 1, "f4")
    values[0, :3] = [np.nan, np.inf, -np.inf]
    seen = grey_of(read(tiff(values, photometric=photometric)))
    assert seen[0, :3].tolist() == ([255, 255, 0] if photometric else [255, 0, 255])
    rest = scaled(values[1:], 0, 1)
    assert np.array_equal(seen[1:], rest if photometric else 255 - rest)


@WAYS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_without_one_number_is_a_blank_page(value: float, read: Read) -> None:
    assert len(np.unique(read(tiff(np.full(SHAPE, value, "f4"))))) == 1


@WAYS
def test_a_large_picture_is_scaled_as_a_whole(read: Read) -> None:
    values = np.linspace(-1, 3, 2100 * 1100, dtype="f4").reshape(2100, 1100)
    assert np.array_equal(grey_of(read(tiff(values))), scaled(values, -1, 3))


@WAYS
def test_a_transparent_shade_of_16_bits_is_white(read: Read) -> None:
    values = ramp(0, 65535, "u2")
    values[:5] = 300
    seen = grey_of(read(encode(Image.fromarray(values), "PNG", transparency=300)))
    assert (seen[:5] == 255).all()
    assert np.array_equal(seen[5:], scaled(values, 0, 65535)[5:])


def over_white(colour: Grey, alpha: Grey) -> npt.NDArray[np.float64]:
    part = alpha[..., None] / 255
    return colour * part + 255 * (1 - part)


@WAYS
@pytest.mark.parametrize(
    ("name", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA"), ("TIFF", "LA"), ("TIFF", "PA")]
)
def test_what_shines_through_lies_on_white(name: str, mode: str, read: Read) -> None:
    picture = with_alpha(scene(*SHAPE[::-1]))
    if mode == "PA":
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB").quantize(50)
        picture = picture.convert("PA")
        picture.putalpha(alpha)
    else:
        picture = picture.convert(mode)
    expected = over_white(np.asarray(picture.convert("RGB")), np.asarray(picture.getchannel("A")))
    assert np.abs(read(encode(picture, name)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_colours_lie_on_white(mode: str) -> None:
    picture = with_alpha(scene(*SHAPE[::-1])).convert(mode.upper())
    expected = over_white(np.asarray(picture.convert("RGB")), np.asarray(picture.getchannel("A")))
    assert np.abs(np.asarray(to_rgb(picture.convert(mode), WHITE)) - expected).max() <= 2


@WAYS
def test_a_transparent_colour_is_white(read: Read) -> None:
    colours = scene(*SHAPE[::-1])
    pixels = np.asarray(colours)
    for picture, is_clear in (
        (colours, (pixels == 0).all(axis=2)),
        (colours.convert("L"), np.asarray(colours.convert("L")) == 0),
    ):
        seen = read(encode(picture, "PNG", transparency=(0, 0, 0) if picture.mode == "RGB" else 0))
        assert is_clear.any()
        assert (seen[is_clear] == 255).all()
        assert np.array_equal(seen[~is_clear], np.asarray(picture.convert("RGB"))[~is_clear])


@WAYS
def test_a_transparent_entry_of_a_palette_is_white(read: Read) -> None:
    picture = scene(*SHAPE[::-1]).quantize(9)
    index = np.asarray(picture)
    expected = np.asarray(picture.convert("RGB")).copy()
    expected[index == 3] = 255
    assert np.array_equal(read(encode(picture, "PNG", transparency=3)), expected)
    alphas = bytes([255, 128, 255, 0, 255, 255, 255, 255, 255])
    halves = over_white(np.asarray(picture.convert("RGB")), np.frombuffer(alphas, np.uint8)[index])
    assert np.abs(read(encode(picture, "PNG", transparency=alphas)) - halves).max() <= 1


@WAYS
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_colours_of_8_bits_are_those_of_the_picture(mode: str, read: Read) -> None:
    colours = scene(*SHAPE[::-1])
    if mode == "LAB":
        # Grey in L*a*b*: a* and b* are zero, L* is about the cube root of the light.
        lightness = ramp(0, 255, "u1")
        zero = Image.fromarray(np.full(SHAPE, 128, "u1"))
        picture = Image.merge("LAB", [Image.fromarray(lightness), zero, zero])
        star = lightness.astype(np.float64) / 255 * 100
        linear = np.where(star > 8, ((star + 16) / 116) ** 3, star / 903.3)
        srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
        expected = np.repeat((srgb * 255)[..., None], 3, axis=2)
        assert np.abs(read(encode(picture, "TIFF")) - expected).max() <= 3
        return
    picture = colours.quantize(40) if mode == "P" else colours.convert(mode)
    seen = read(encode(picture, "TIFF"))
    if mode == "CMYK":
        cyan, magenta, yellow, key = (np.asarray(band, np.int64) for band in picture.split())
        inks = np.stack([cyan, magenta, yellow], axis=2)
        expected = (255 - inks) * (255 - key[..., None]) / 255
        assert np.abs(seen - expected).max() <= 1
    elif mode == "YCbCr":
        assert np.abs(seen.astype(np.int64) - np.asarray(colours)).max() <= 3
    else:
        assert np.array_equal(seen, np.asarray(picture.convert("RGB")))


def test_hsv_is_read_as_well() -> None:
    assert to_rgb(Image.new("HSV", (2, 2), (0, 255, 255)), WHITE).getpixel((0, 0)) == (255, 0, 0)


def test_ordinary_pictures_are_not_even_copied() -> None:
    picture = scene(*SHAPE)
    assert to_rgb(picture, WHITE) is picture


@given(st.lists(st.floats(width=32) | st.just(0.0), min_size=4, max_size=4))
def test_no_floats_are_too_odd(numbers: list[float]) -> None:
    assert read_in_chat(tiff(np.array(numbers, "f4").reshape(2, 2))).shape == (2, 2, 3)


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_16_bits_are_read_in_every_order_of_bytes(mode: str, dtype: str) -> None:
    values = ramp(0, 65535, "u2")
    picture = Image.frombuffer(mode, SHAPE[::-1], values.astype(dtype).tobytes(), "raw", mode, 0, 1)
    assert np.array_equal(grey_of(np.asarray(to_rgb(picture, WHITE))), scaled(values, 0, 65535))


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, {"transparency": 0}])
def test_no_pixel_format_of_pillows_is_unknown(mode: str, info: dict[str, int]) -> None:
    picture = Image.new(mode, (3, 2))
    picture.info.update(info)
    assert to_rgb(picture, WHITE).mode == "RGB"
