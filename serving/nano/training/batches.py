"""Batches of rendered pages with everything the training losses look at, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from serving.nano.config import NANO, NanoConfig
from serving.nano.pages import LINE_PX, PITCH_PX, GreyPage, RenderedPage
from serving.nano.tokenizer import EOS_ID, FIRST_COLUMN_ID, FIRST_LINE_ID, PAD_ID, encode_text

OCR_PROMPT = encode_text("\nFree OCR.")
IGNORED = -100
PAGE_END = 1
_READABLE_PX = 12
"""A patch counts as showing a character when its centre is at most so far above or below the character's."""

Labels = NDArray[np.int64]


def resize_view(pixels: GreyPage, side_px: int) -> GreyPage:
    """Return a square page as a view of `side_px` pixels: what every mode makes of it, nothing being padded or cut."""
    if pixels.shape == (side_px, side_px):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Batch:
    """Pages of one size with their texts, padded on the right.

    Shapes: b pages, n text places, s patches and g vision tokens a side of the view that the encoder gets.
    """

    pages: Tensor
    """uint8 [b, S, S]: the views."""
    ids: Tensor
    """int64 [b, n]: the text's tokens, the end marker, padding."""
    is_text: Tensor
    """bool [b, n]: False on padding."""
    columns: Tensor
    rows: Tensor
    """int64 [b, n]: patch column and row, on the native page, of the place that each token is read from; clamped."""
    targets: Tensor
    """int64 [b, n]: which of the image's prompt tokens shows that place."""
    patch_chars: Tensor
    """int64 [b, s, s]: byte value of the character that a patch shows, 0 for paper, `IGNORED` when in doubt."""
    cell_chars: Tensor
    """int64 [b, 4g, 4g]: what each vision token is to say about the 4 x 2 places whose columns modulo 4 and lines
    modulo 2 it has room for, two labels a place, one above the other. Beside the printed characters these are spaces,
    newlines behind their lines and `PAGE_END` behind the last one; `IGNORED` where the token does not show the place.
    At the native size a token shows exactly its 4 x 2 places. Larger views leave rooms empty instead of renaming
    them, so that the decoder reads every size in the same way.
    """
    is_more: Tensor
    """int64 [b, g, 2]: whether text follows below the even and the odd line that a row of vision tokens shows."""
    is_near_end: Tensor
    """bool [b, g, 2]: whether that line is the page's last or the one before, where it is easiest to be wrong."""

    @classmethod
    def from_pages(cls, pages: Sequence[RenderedPage], sizes: NanoConfig = NANO, view_px: int | None = None) -> Self:
        """Collate pages of `sizes.image_size` pixels, seen at `view_px` (by default that size as well)."""
        view_px = view_px or sizes.image_size
        grid = _PlaceGrid.build(view_px, sizes)
        width = max(len(page.text) for page in pages) + 1
        ids = np.full((len(pages), width), PAD_ID, np.int64)
        places = np.zeros((2, len(pages), width), np.int64)
        for row, page in enumerate(pages):
            tokens = [*_encode_page(page), EOS_ID]
            ids[row, : len(tokens)] = tokens
            # The end marker is read from the place behind the last line, where a newline would stand.
            end = page.centers[-1:] + np.array([[PITCH_PX, 0]], np.float32)
            centers = np.concatenate([page.centers, end])
            places[:, row, : len(tokens)] = np.clip(centers.T // sizes.patch_size, 0, sizes.sam_side - 1)
        lines = [int(page.centers[-1, 1]) // LINE_PX for page in pages]
        steps = np.stack([grid.rows - line for line in lines])
        shown = np.where(grid.rows == IGNORED, IGNORED, steps < 0)
        targets = grid.token_row[places[1] // 2] * (grid.side + 1) + grid.token_column[places[0]]
        return cls(
            pages=torch.from_numpy(np.stack([resize_view(page.pixels, view_px) for page in pages])),
            ids=torch.from_numpy(ids),
            is_text=torch.from_numpy(ids != PAD_ID),
            columns=torch.from_numpy(places[0]),
            rows=torch.from_numpy(places[1]),
            targets=torch.from_numpy(targets),
            patch_chars=torch.from_numpy(np.stack([grid.spread(_label_patches(page, sizes, "")) for page in pages])),
            cell_chars=torch.from_numpy(np.stack([grid.file(_label_patches(page, sizes, " \n")) for page in pages])),
            is_more=torch.from_numpy(shown.astype(np.int64)),
            is_near_end=torch.from_numpy((steps == 0) | (steps == -1)),
        )


@dataclass(frozen=True)
class _PlaceGrid:
    """Where the places of the native page, 16 x 32 pixels each, lie in a view of another size."""

    side: int
    """Vision tokens a side."""
    token_column: Labels
    token_row: Labels
    """The column of the vision token that shows a column of places, and the row for a line of them."""
    rows: Labels
    """[side, 2]: the even and the odd line that a row of vision tokens shows, `IGNORED` for none."""
    patches: Labels
    """The native patch that is shown by each patch along a side of the view."""

    @classmethod
    def build(cls, view_px: int, sizes: NanoConfig) -> Self:
        scale, cell = view_px / sizes.image_size, sizes.cell_size
        columns, lines = np.arange(sizes.image_size // PITCH_PX), np.arange(sizes.image_size // LINE_PX)
        token_row = ((lines + 0.5) * LINE_PX * scale // cell).astype(np.int64)
        rows = np.full((view_px // cell, 2), IGNORED, np.int64)
        rows[token_row, lines % 2] = lines
        return cls(
            side=view_px // cell,
            token_column=((columns + 0.5) * PITCH_PX * scale // cell).astype(np.int64),
            token_row=token_row,
            rows=rows,
            patches=((np.arange(view_px // sizes.patch_size) + 0.5) / scale).astype(np.int64),
        )

    def spread(self, labels: Labels) -> Labels:
        """Map labels of the native patches to labels of the view's."""
        return labels[self.patches[:, None], self.patches]

    def file(self, labels: Labels) -> Labels:
        """Map labels of the native patches to the rooms of the vision tokens that show them."""
        filed = np.full((4 * self.side, 4 * self.side), IGNORED, np.int64)
        half_lines, columns = np.arange(labels.shape[0]), np.arange(labels.shape[1])
        rooms = 4 * self.token_row[half_lines // 2] + half_lines % 4, 4 * self.token_column + columns % 4
        filed[rooms[0][:, None], rooms[1]] = labels
        return filed


def _encode_page(page: RenderedPage) -> list[int]:
    """Return the tokens of an ASCII page: every space says its column, every newline the line it leads to."""
    tokens = encode_text(page.text)
    for index, (char, (x, _)) in enumerate(zip(page.text, page.centers.tolist(), strict=True)):
        if char == " ":
            tokens[index] = FIRST_COLUMN_ID + int(x) // PITCH_PX
        elif char == "\n":
            tokens[index] = FIRST_LINE_ID + int(page.centers[index + 1, 1]) // LINE_PX
    return tokens


def _label_patches(page: RenderedPage, sizes: NanoConfig, whitespace: str) -> Labels:
    """Return what each patch of the native page shows, [s, s].

    That is printed characters, those in `whitespace`, and with any of these the page's end.
    """
    side, patch = sizes.sam_side, sizes.patch_size
    labels = np.zeros((side, side), np.int64)
    middles = (np.arange(side) + 0.5) * patch
    places = [(ord(char), *center) for char, center in zip(page.text, page.centers.tolist(), strict=True)]
    if whitespace:
        x, y = page.centers[-1].tolist()
        places.append((PAGE_END, x + PITCH_PX, y))
    for label, x, y in places:
        column = int(x // patch)
        if not 0 <= column < side or (chr(label) in " \n" and chr(label) not in whitespace):
            continue
        distance = np.abs(middles - y)
        labels[(distance > _READABLE_PX) & (distance < LINE_PX * 0.75), column] = IGNORED
        labels[distance <= _READABLE_PX, column] = label
    return labels
