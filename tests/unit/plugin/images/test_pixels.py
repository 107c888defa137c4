"""Decoding and resampling against vLLM's own loader and preprocessing, on files as odd as they come."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.image_files import FILES, GREY, SHOWN_OTHERWISE, Array, encode, scene
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media.image import ImageMediaIO

from serving.plugin.images.decoding import DecodeError, decode, read_header
from serving.plugin.images.page_views import WHITE, build_views
from serving.plugin.images.resampling import resample
from serving.plugin.modes.resolution import ResolutionMode
from serving.plugin.modes.selection import MODES

SIZES = [
    (1, 1),
    (1, 5000),
    (5000, 1),
    (639, 640),
    (640, 640),
    (641, 640),
    (641, 1200),
    (400, 1900),
    (1654, 2339),
    (3000, 2000),
]


@pytest.mark.parametrize("name", FILES)
def test_files_are_decoded_as_by_vllm(name: str) -> None:
    data = FILES[name]()
    expected = ImageMediaIO().load_bytes(data).media
    ours = decode(data, ALLOWED_IMAGE_FORMATS, WHITE)
    assert np.array_equal(np.asarray(ours), np.asarray(expected)) == (name not in SHOWN_OTHERWISE)


@pytest.mark.parametrize("name", FILES)
def test_headers_tell_the_size_as_shown(name: str) -> None:
    data = FILES[name]()
    header = read_header(data, ALLOWED_IMAGE_FORMATS)
    if header.is_lazy:
        assert header.size == ImageMediaIO().load_bytes(data).media.size


def test_what_a_scanner_makes_is_trusted_before_it_is_decoded() -> None:
    names = ("jpeg", "jpeg turned 6", "cmyk jpeg", "tiff", "grey png", "rgba png", "webp")
    assert all(read_header(FILES[name](), ALLOWED_IMAGE_FORMATS).is_lazy for name in names)
    assert not read_header(FILES["turned png"](), ALLOWED_IMAGE_FORMATS).is_lazy


def test_the_background_shows_through() -> None:
    data = encode(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "PNG")
    assert np.asarray(decode(data, ALLOWED_IMAGE_FORMATS, (1, 2, 3))).tolist() == [[[1, 2, 3]] * 2] * 2


TRUNCATED = [
    (name, part)
    for name in ("jpeg", "progressive jpeg", "grey png", "tiff", "webp", "animated gif", "bmp")
    for part in (0.02, 0.5, 0.95)
    if (name.split()[-1], part) != ("jpeg", 0.95)  # a margin that can be spared: see test_repairs.py
]


@pytest.mark.parametrize(("name", "part"), TRUNCATED)
def test_truncated_files_are_refused(name: str, part: float) -> None:
    data = FILES[name]()
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * part)], ALLOWED_IMAGE_FORMATS, WHITE)


def test_formats_outside_the_list_are_refused() -> None:
    for read in (lambda data: read_header(data, ("JPEG",)), lambda data: decode(data, ("JPEG",), WHITE)):
        with pytest.raises(DecodeError):
            read(FILES["grey png"]())


@pytest.mark.parametrize("name", ["jpeg", "grey png", "tiff", "webp", "turned png", "animated gif", "bmp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_decoded_or_refused_and_nothing_else(name: str) -> None:
    data = FILES[name]()
    dice = random.Random(name)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(dice.choice([1, 4, 40])):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        try:
            header = read_header(bytes(broken), ALLOWED_IMAGE_FORMATS)
            if header.size[0] * header.size[1] < 10_000_000:
                decode(bytes(broken), ALLOWED_IMAGE_FORMATS, WHITE)
        except DecodeError as error:
            assert "Failed to load image" in str(error)  # noqa: PT017


def pillows_views(page: Image.Image, mode: ResolutionMode) -> tuple[Array, Array]:
    """The published preprocessing, done by Pillow: the global view and the tiles, as (height, width, 3)."""
    if mode.squeezes:
        page = page.resize((mode.image_size, mode.image_size))
    view = ImageOps.pad(page, (mode.base_size, mode.base_size), color=GREY)
    grid, side = mode.tile_grid(*page.size), mode.image_size
    whole = np.asarray(page.resize((grid.columns * side, grid.rows * side)))
    tiles = [
        whole[row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
    return np.asarray(view), np.stack(tiles) if grid.is_tiled else np.empty((0, side, side, 3), np.uint8)


def assert_views_are_pillows(page: Image.Image, mode: ResolutionMode) -> None:
    ours = build_views(page, mode, GREY)
    view, tiles = pillows_views(page, mode)
    assert np.array_equal(ours.global_view.numpy(), view.transpose(2, 0, 1))
    assert np.array_equal(ours.tiles.numpy(), tiles.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_views_are_pillows_bit_for_bit(size: tuple[int, int], mode: str) -> None:
    assert_views_are_pillows(scene(*size), MODES[mode])


@pytest.mark.parametrize("name", FILES)
def test_views_of_odd_files_are_pillows_bit_for_bit(name: str) -> None:
    page = decode(FILES[name](), ALLOWED_IMAGE_FORMATS, WHITE)
    image = page if isinstance(page, Image.Image) else Image.fromarray(page)
    assert_views_are_pillows(image.resize((image.width * 3, image.height * 3)), ResolutionMode())


def test_views_of_a_dithered_page_are_pillows_bit_for_bit() -> None:
    """Black and white dots beside each other are the hardest for a filter that rounds."""
    page = Image.linear_gradient("L").resize((1654, 2339)).convert("1").convert("RGB")
    assert_views_are_pillows(page, ResolutionMode())


def test_pages_are_resampled_as_by_pillow_at_any_size() -> None:
    dice = random.Random(5)
    for _ in range(400):
        size, target = ((dice.randrange(1, 300), dice.randrange(1, 300)) for _ in range(2))
        pixels = np.random.default_rng(size).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8) * 255
        assert np.array_equal(resample(pixels, target), np.asarray(Image.fromarray(pixels).resize(target))), (
            size,
            target,
        )


def test_a_page_of_the_views_size_is_not_resampled() -> None:
    page = scene(640, 640)
    views = build_views(page, ResolutionMode(640, 640, False), GREY)
    assert np.array_equal(views.global_view.numpy(), np.asarray(page).transpose(2, 0, 1))


def test_sizes_that_differ_in_a_squeezed_mode_are_reached_in_two_steps() -> None:
    page = scene(900, 300)
    expected = page.resize((640, 640)).resize((1024, 1024))
    views = build_views(page, ResolutionMode(1024, 640, False), GREY)
    assert np.array_equal(views.global_view.numpy(), np.asarray(expected).transpose(2, 0, 1))
