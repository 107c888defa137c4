"""Creates the encoder's views from RGB pixels, bit-exact with the published preprocessing.

Views are written directly into the buffer in which they are passed on. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from serving.plugin.images.decoding import Pixels, size_of
from serving.plugin.images.geometry import Size
from serving.plugin.images.picture import Colour
from serving.plugin.modes.resolution import ResolutionMode, TileGrid


@dataclass(frozen=True, slots=True)
class Layout:
    """The positions of a page's views in one flat uint8 buffer: the global view, then the tiles row by row."""

    mode: ResolutionMode
    grid: TileGrid

    @classmethod
    def of(cls, size: Size, mode: ResolutionMode) -> Layout:
        return cls(mode, mode.tile_grid(*size))

    @property
    def view_shape(self) -> tuple[int, int, int]:
        return (3, self.mode.base_size, self.mode.base_size)

    @property
    def tiles_shape(self) -> tuple[int, int, int, int]:
        return (self.grid.num_tiles, 3, self.mode.image_size, self.mode.image_size)

    @property
    def view_bytes(self) -> int:
        return 3 * self.mode.base_size**2

    @property
    def size_bytes(self) -> int:
        return self.view_bytes + 3 * self.grid.num_tiles * self.mode.image_size**2


def draw_views(page: Pixels | Image.Image, layout: Layout, padding: Colour, buffer: mmap.mmap | Pixels) -> None:
    """Cut a page into its views, resampled bicubically as the published preprocessing does.

    Args:
        page: RGB, of the layout's size.
        layout: the views and their positions.
        padding: colour of the borders that preserve the page's aspect ratio in the global view.
        buffer: uint8, at least layout.size_bytes long; every byte up to there is written.
    """
    if isinstance(page, Image.Image):
        page = np.array(page)
    mode = layout.mode
    if mode.squeezes:
        # Two steps if the sizes differ, as published: the page is distorted to a square, then padded to the view.
        page = _resample(page, (mode.image_size, mode.image_size))
    pixels = np.frombuffer(buffer, np.uint8, layout.size_bytes)
    _pad(page, pixels[: layout.view_bytes].reshape(layout.view_shape), padding)
    if layout.grid.is_tiled:
        _cut(page, layout, pixels[layout.view_bytes :])


def _pad(page: Pixels, view: Pixels, padding: Colour) -> None:
    """Centre the whole page in the square, with the positions and rounding of Pillow's `ImageOps.pad`."""
    side = view.shape[1]
    width, height = _contained(size_of(page), side)
    left, top = (0, round((side - height) * 0.5)) if width == side else (round((side - width) * 0.5), 0)
    for channel, value in enumerate(padding):
        view[channel, :top] = value
        view[channel, top + height :] = value
        view[channel, top : top + height, :left] = value
        view[channel, top : top + height, left + width :] = value
    if width and height:
        split_channels(_resample(page, (width, height)), view[:, top : top + height, left : left + width])


def _contained(size: Size, side: int) -> Size:
    """Return the largest size with the same aspect ratio within a square; it may be zero for a very long page."""
    width, height = size
    if width == height:
        return side, side
    return (side, round(height / width * side)) if width > height else (round(width / height * side), side)


def _cut(page: Pixels, layout: Layout, tiles: Pixels) -> None:
    """Stretch the page over the whole grid and cut it, row by row."""
    side, grid = layout.mode.image_size, layout.grid
    stretched = _resample(page, (grid.columns * side, grid.rows * side))
    bands = stretched.reshape(grid.rows, side, grid.columns, side, 3)
    for place, tile in enumerate(tiles.reshape(-1, 3, side, side)):
        row, column = divmod(place, grid.columns)
        split_channels(bands[row, :, column], tile)


def _resample(page: Pixels, target: Size) -> Pixels:
    # Imported late: vLLM 0.32 inspects all modules when an engine starts on a CPU, and fails on numba's.
    from serving.plugin.images.resampling import resample

    return resample(page, target)


def split_channels(pixels: Pixels, planes: Pixels) -> None:
    """(height, width, 3) into (3, height, width); both may be parts of something larger."""
    # numpy's own transposition is several times slower on single bytes.
    cv2.split(pixels, list(planes))
