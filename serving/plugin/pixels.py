"""From RGB pixels to the views that the encoder sees, written straight into the buffer that they are handed on in.

Two resamplers with one kernel: Pillow's, bit for bit what the published preprocessing gives, and torch's, which is
faster and within 2/255 of it on at most 0.5% of the values. Neither torch nor vLLM is imported by the module.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
from PIL import Image

from serving.plugin.decoding import Colour, Pixels, Size, size_of
from serving.plugin.modes import ResolutionMode, TileGrid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the views of a page lie in one flat buffer of uint8: the global view, then the tiles row by row."""

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


class Resampler(Protocol):
    """A page that can be had in other sizes."""

    @property
    def size(self) -> Size: ...

    def planes(self, size: Size) -> Pixels:
        """The page stretched to these pixels: uint8, shape (3, height, width)."""


class ExactResampler:
    """Pillow's bicubic filter, bit for bit."""

    def __init__(self, page: Pixels | Image.Image) -> None:
        from serving.plugin import exact  # late, since numba takes a second that fast workers do without

        self._exact = exact
        self._page = to_array(page)

    @property
    def size(self) -> Size:
        return size_of(self._page)

    def planes(self, size: Size) -> Pixels:
        return to_planes(self._exact.resample(self._page, size, is_vertical_first(self.size, size)))


class FastResampler:
    """torch's antialiased bicubic filter: the same kernel with weights of 16 bits."""

    def __init__(self, page: Pixels | Image.Image) -> None:
        import torch  # late, since exact workers do without it

        self._torch = torch
        self._page = torch.from_numpy(to_array(page)).permute(2, 0, 1)[None]

    @property
    def size(self) -> Size:
        return self._page.shape[3], self._page.shape[2]

    def planes(self, size: Size) -> Pixels:
        if size == self.size:
            return self._planes(self._page)
        page = self._page
        if is_vertical_first(self.size, size):
            page = self._stretch(page, (self.size[0], size[1]))
        return self._planes(self._stretch(page, size))

    def _stretch(self, page: torch.Tensor, size: Size) -> torch.Tensor:
        return self._torch.nn.functional.interpolate(page, size=(size[1], size[0]), mode="bicubic", antialias=True)

    @staticmethod
    def _planes(page: torch.Tensor) -> Pixels:
        planes: Pixels = page[0].contiguous().numpy()
        return planes


def is_vertical_first(size: Size, target: Size) -> bool:
    """Whether Pillow 13 shortens the columns before the rows, where torch always does it the other way round.

    Both round and clip to bytes in between, so at sharp edges the order shows. Found by comparing 6,000 random sizes.
    """
    shortened_by = size[1] - target[1]
    return shortened_by > 0 and shortened_by > 2 * (size[0] - target[0])


def draw_views(
    page: Pixels | Image.Image, layout: Layout, padding: Colour, is_exact: bool, buffer: mmap.mmap | Pixels
) -> None:
    """Cut a page into its views, resampled bicubically as the published preprocessing does.

    Args:
        page: RGB, of the size that the layout was made for.
        layout: the views and their places.
        padding: colour of the borders that keep the page's aspect ratio in the global view.
        is_exact: Pillow's resampler instead of the fast one.
        buffer: uint8, layout.size_bytes long or longer; every byte up to there is written.
    """
    build = ExactResampler if is_exact else FastResampler
    resampler: Resampler = build(page)
    mode = layout.mode
    if mode.squeezes:
        # Two steps when the sizes differ, as published: the squeezed page is then padded to the view.
        resampler = build(to_pixels(resampler.planes((mode.image_size, mode.image_size))))
    pixels = np.frombuffer(buffer, np.uint8, layout.size_bytes)
    _pad(resampler, pixels[: layout.view_bytes].reshape(layout.view_shape), padding)
    if layout.grid.is_tiled:
        _cut(resampler, layout, pixels[layout.view_bytes :])


def _pad(resampler: Resampler, view: Pixels, padding: Colour) -> None:
    """Put the whole page into the middle of the square; places and rounding are those of Pillow's `ImageOps.pad`."""
    side = view.shape[1]
    width, height = _contained(resampler.size, side)
    left, top = (0, round((side - height) * 0.5)) if width == side else (round((side - width) * 0.5), 0)
    for channel, value in enumerate(padding):
        view[channel, :top] = value
        view[channel, top + height :] = value
        view[channel, top : top + height, :left] = value
        view[channel, top : top + height, left + width :] = value
    if width and height:
        view[:, top : top + height, left : left + width] = resampler.planes((width, height))


def _contained(size: Size, side: int) -> Size:
    """The largest size of the same aspect ratio within a square. A very long page may have nothing left of it."""
    width, height = size
    if width == height:
        return side, side
    return (side, round(height / width * side)) if width > height else (round(width / height * side), side)


def _cut(resampler: Resampler, layout: Layout, tiles: Pixels) -> None:
    """Stretch the page over the whole grid and cut it, row by row."""
    side, grid = layout.mode.image_size, layout.grid
    planes = resampler.planes((grid.columns * side, grid.rows * side))
    target = tiles.reshape(grid.rows, grid.columns, 3, side, side)
    np.copyto(target, planes.reshape(3, grid.rows, side, grid.columns, side).transpose(1, 3, 0, 2, 4))


def to_array(page: Pixels | Image.Image) -> Pixels:
    """A page as an array of shape (height, width, 3) that may be written to."""
    return np.array(page) if isinstance(page, Image.Image) else page


def to_planes(pixels: Pixels) -> Pixels:
    """(height, width, 3) to (3, height, width), contiguous."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    # Not numpy's transposition, which is several times as slow on single bytes.
    cv2.split(pixels, list(planes))
    return planes


def to_pixels(planes: Pixels) -> Pixels:
    """(3, height, width) to (height, width, 3), contiguous."""
    return np.ascontiguousarray(planes.transpose(1, 2, 0))
