"""From a decoded page to the pixels that the encoder sees: views cut, resized and padded, as uint8.

Normalising to floats is left to the model's device: a byte per value crosses to the engine process instead of four.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from serving.plugin.modes import ResolutionMode, TileGrid


@dataclass(frozen=True, slots=True)
class PageViews:
    """What the encoder gets of one page.

    global_view: uint8, shape (3, base_size, base_size).
    tiles: uint8, shape (grid.num_tiles, 3, image_size, image_size), row by row.
    """

    global_view: torch.Tensor
    tiles: torch.Tensor
    grid: TileGrid


def build_views(page: Image.Image, mode: ResolutionMode, padding: tuple[int, int, int]) -> PageViews:
    """Cut a page into its views, resampled bicubically as the published preprocessing does.

    Args:
        page: RGB, any size.
        mode: sizes and tiling.
        padding: RGB colour of the borders that keep the page's aspect ratio in the global view.
    """
    grid = mode.tile_grid(*page.size)
    side = mode.base_size
    if mode.squeezes:
        # Two steps when the sizes differ, as published: the squeezed page is then padded to the view.
        page = page.resize((mode.image_size, mode.image_size))
    view = ImageOps.pad(page, (side, side), color=padding)
    tiles = (
        _cut(page, grid, mode.image_size) if grid.is_tiled else torch.empty(_tiles_shape(0, mode), dtype=torch.uint8)
    )
    return PageViews(_to_planes(view)[0], tiles, grid)


def _cut(page: Image.Image, grid: TileGrid, size: int) -> torch.Tensor:
    """Stretch the page over the whole grid and cut it: (num_tiles, 3, size, size), row by row."""
    stretched = page.resize((grid.columns * size, grid.rows * size))
    planes = _to_planes(stretched)[0]
    tiles = planes.view(3, grid.rows, size, grid.columns, size).permute(1, 3, 0, 2, 4)
    return tiles.reshape(grid.num_tiles, 3, size, size)


def _to_planes(image: Image.Image) -> torch.Tensor:
    """An RGB image as (1, 3, height, width), contiguous."""
    pixels = np.asarray(image, dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


def _tiles_shape(num_tiles: int, mode: ResolutionMode) -> tuple[int, int, int, int]:
    return (num_tiles, 3, mode.image_size, mode.image_size)
