"""Resolution modes against vLLM's own tiling and against the published token counts."""

from __future__ import annotations

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.plugin.modes.resolution import ResolutionMode, TileGrid, closest_grid

sides = st.integers(1, 6000)
GUNDAM = ResolutionMode()


@pytest.mark.parametrize(
    ("mode", "page", "num_tokens"),
    [
        (ResolutionMode(512, 512, False), (1654, 2339), 64 + 8 + 1),
        (ResolutionMode(640, 640, False), (1654, 2339), 100 + 10 + 1),
        (ResolutionMode(1024, 1024, False), (1654, 2339), 256 + 16 + 1),
        (ResolutionMode(1280, 1280, False), (1654, 2339), 400 + 20 + 1),
        (GUNDAM, (640, 640), 273),
        (GUNDAM, (1654, 2339), 903),  # 2 x 3 tiles
    ],
)
def test_published_modes_make_the_published_numbers_of_tokens(
    mode: ResolutionMode, page: tuple[int, int], num_tokens: int
) -> None:
    assert mode.num_tokens(*page) == num_tokens


@given(width=sides, height=sides, max_tiles=st.integers(2, 9))
def test_grid_is_the_one_that_vllm_chooses(
    stock_processing: types.ModuleType, width: int, height: int, max_tiles: int
) -> None:
    grid = closest_grid(width, height, 640, max_tiles=max_tiles)
    expected = stock_processing.count_tiles(width, height, max_num=max_tiles, image_size=640)
    assert (grid.columns, grid.rows) == expected


@given(width=sides, height=sides)
def test_token_count_is_vllms(stock: types.ModuleType, width: int, height: int) -> None:
    expected = stock.DeepseekOCRProcessingInfo.get_num_image_tokens(None, image_width=width, image_height=height)
    assert GUNDAM.num_tokens(width, height) == expected


@given(width=sides, height=sides, crop_mode=st.booleans())
def test_no_page_makes_more_tokens_than_the_largest(width: int, height: int, crop_mode: bool) -> None:
    mode = ResolutionMode(1024, 640, crop_mode)
    assert mode.num_tokens(width, height) <= mode.num_tokens(*mode.largest_page())


@pytest.mark.parametrize(("page", "grid"), [((640, 640), (1, 1)), ((641, 640), (2, 2)), ((640, 641), (2, 2))])
def test_a_page_is_cut_only_beyond_the_tile_size(page: tuple[int, int], grid: tuple[int, int]) -> None:
    assert GUNDAM.tile_grid(*page) == TileGrid(*grid)


def test_an_uncut_page_has_no_tiles() -> None:
    assert TileGrid(1, 1).num_tiles == 0
    assert TileGrid(1, 2).num_tiles == 2


@pytest.mark.parametrize("size", [0, -64, 100])
def test_sizes_that_do_not_make_whole_tokens_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        ResolutionMode(base_size=size)


def test_a_checkpoint_that_names_no_sizes_is_read_in_the_published_dynamic_mode() -> None:
    assert ResolutionMode.from_config({}) == ResolutionMode(1024, 640, True)


def test_a_checkpoints_sizes_are_taken() -> None:
    config = {"base_size": 512, "image_size": 512, "crop_mode": False, "image_mean": [0.5] * 3}
    assert ResolutionMode.from_config(config) == ResolutionMode(512, 512, False)


@pytest.mark.parametrize(("size", "squeezes"), [(512, True), (640, True), (1024, False), (1280, False)])
def test_small_untiled_modes_squeeze_and_large_ones_pad(size: int, squeezes: bool) -> None:
    assert ResolutionMode(size, size, False).squeezes is squeezes
