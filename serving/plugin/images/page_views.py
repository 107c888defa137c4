"""A page's views as uint8 tensors in one contiguous buffer.

Normalisation to floats happens on the model's device, so that one byte per value is sent to the engine, not four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from serving.plugin.images.decoding import Pixels, size_of
from serving.plugin.images.picture import Colour, to_rgb
from serving.plugin.images.views import Layout, draw_views
from serving.plugin.modes.resolution import ResolutionMode, TileGrid

WHITE = (255, 255, 255)
"""The colour that vLLM shows behind transparent pixels."""


@dataclass(frozen=True, slots=True)
class PageViews:
    """The encoder's input for one page.

    global_view: uint8, shape (3, base_size, base_size).
    tiles: uint8, shape (grid.num_tiles, 3, image_size, image_size), row by row.
    """

    global_view: torch.Tensor
    tiles: torch.Tensor
    grid: TileGrid

    @classmethod
    def in_buffer(cls, buffer: torch.Tensor, layout: Layout) -> PageViews:
        """Return the views in a flat uint8 buffer, without copying."""
        view = buffer[: layout.view_bytes].view(layout.view_shape)
        return cls(view, buffer[layout.view_bytes : layout.size_bytes].view(layout.tiles_shape), layout.grid)


def build_views(page: Pixels | Image.Image, mode: ResolutionMode, padding: Colour) -> PageViews:
    """Create the views of a page in the calling thread.

    Args:
        page: image of any size; an array must be RGB of shape (height, width, 3).
        mode: sizes and tiling.
        padding: RGB colour of the borders that keep the page's aspect ratio in the global view.
    """
    if isinstance(page, Image.Image):
        page = to_rgb(page, WHITE)
    layout = Layout.of(size_of(page), mode)
    buffer = torch.empty(layout.size_bytes, dtype=torch.uint8)
    draw_views(page, layout, padding, buffer.numpy())
    return PageViews.in_buffer(buffer, layout)
