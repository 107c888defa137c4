"""How a page is divided into views and tokens: resolution modes, the tile grid, token counts. Pure.

The rules are the published model's (DeepSeek-OCR paper, section 3.2.2, arXiv:2510.18234): the encoder receives a page
as one square global view of `base_size` pixels per side and, in crop mode, also as a grid of square tiles of
`image_size` pixels per side. Each 64 x 64 pixels of a view become one token; every row of tokens ends with a newline
token, and the page with a separator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

PIXELS_PER_TOKEN_SIDE = 64
"""16-pixel patches, reduced by a factor of four per side by the convolutions between SAM and CLIP."""
MIN_TILES = 2
MAX_TILES = 6
TILES_LIMIT = 9
_SQUEEZED_UP_TO = 640
"""Without tiles, views up to this size stretch the page to a square, and larger ones pad it (same section)."""


@dataclass(frozen=True, slots=True)
class ResolutionMode:
    """A way to view a page; the fields have the published model's names. Sizes are in pixels."""

    base_size: int = 1024
    image_size: int = 640
    crop_mode: bool = True
    min_tiles: int = MIN_TILES
    max_tiles: int = MAX_TILES
    has_newlines: bool = True
    """Whether each row of tokens ends with a newline token."""
    tiles_limit: int = TILES_LIMIT
    """Most tiles that the model can be asked for."""

    def __post_init__(self) -> None:
        limit = self.tiles_limit
        if not 1 <= self.min_tiles <= self.max_tiles <= limit or self.max_tiles < 2:
            raise ValueError(f"tiles must be 1 <= min_tiles <= max_tiles <= {limit} with max_tiles of 2 or more")
        for name in ("base_size", "image_size"):
            size = getattr(self, name)
            if size <= 0 or size % PIXELS_PER_TOKEN_SIDE:
                raise ValueError(f"{name} must be a positive multiple of {PIXELS_PER_TOKEN_SIDE}, not {size}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ResolutionMode:
        """Read a checkpoint's `preprocessor_config.json`; missing values are the published ones (1024/640/true)."""
        default = cls()
        return cls(**{field.name: config.get(field.name, getattr(default, field.name)) for field in fields(cls)})

    @property
    def squeezes(self) -> bool:
        """Whether the global view stretches the page to fill the square instead of padding it."""
        return not self.crop_mode and self.image_size <= _SQUEEZED_UP_TO

    def tile_grid(self, width: int, height: int) -> TileGrid:
        """Return the grid into which a page of this size in pixels is cut; 1 x 1 if it is not cut."""
        if not self.crop_mode or max(width, height) <= self.image_size:
            return TileGrid(1, 1)
        return closest_grid(width, height, self.image_size, self.min_tiles, self.max_tiles)

    def num_tokens(self, width: int, height: int) -> int:
        """Return the image tokens of a page of this size in pixels, newlines and separator included."""
        return self.num_grid_tokens(self.tile_grid(width, height))

    def num_grid_tokens(self, grid: TileGrid) -> int:
        """Return the image tokens of a page that is cut into this grid."""
        side = self.base_size // PIXELS_PER_TOKEN_SIDE
        newline = int(self.has_newlines)
        num_tokens = side * (side + newline) + 1
        if grid.is_tiled:
            tile_side = self.image_size // PIXELS_PER_TOKEN_SIDE
            num_tokens += grid.rows * tile_side * (grid.columns * tile_side + newline)
        return num_tokens

    def largest_page(self) -> tuple[int, int]:
        """Return the width and height of a page with the largest possible number of tokens."""
        grids = _grids(self.min_tiles, self.max_tiles) if self.crop_mode else (TileGrid(1, 1),)
        grid = max(grids, key=self.num_grid_tokens)
        return grid.columns * self.image_size, grid.rows * self.image_size


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of a page."""

    columns: int
    rows: int

    @property
    def num_tiles(self) -> int:
        """Tiles that are encoded in addition to the global view; 0 for a page that is not cut."""
        return self.columns * self.rows if self.is_tiled else 0

    @property
    def is_tiled(self) -> bool:
        return self.columns > 1 or self.rows > 1


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[TileGrid, ...]:
    """Return all grids within these numbers of tiles, those with the fewest tiles first."""
    sides = range(1, max_tiles + 1)
    grids = (TileGrid(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles)
    return tuple(sorted(grids, key=lambda grid: grid.columns * grid.rows))


def closest_grid(
    width: int, height: int, tile_size: int, min_tiles: int = MIN_TILES, max_tiles: int = MAX_TILES
) -> TileGrid:
    """Return the grid whose aspect ratio is closest to the page's.

    Of two equally close grids, the one with more tiles is taken if the page has more than half of its pixels (the rule
    of InternVL's dynamic tiling, which the published model adopted).
    """
    aspect_ratio = width / height
    best, best_distance = TileGrid(1, 1), math.inf
    for grid in _grids(min_tiles, max_tiles):
        distance = abs(aspect_ratio - grid.columns / grid.rows)
        fills = width * height > 0.5 * tile_size * tile_size * grid.columns * grid.rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = grid, distance
    return best
