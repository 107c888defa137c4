"""Batches of rendered pages with everything the training losses look at, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from serving.demo.config import NANO, NanoConfig
from serving.demo.pages import LINE_PX, PITCH_PX, Page
from serving.demo.tokenizer import EOS_ID, FIRST_COLUMN_ID, FIRST_LINE_ID, PAD_ID, encode_text

OCR_PROMPT = encode_text("\nFree OCR.")
IGNORED = -100
PAGE_END = 1
_READABLE_PX = 12
"""A patch counts as showing a character when its centre is at most so far above or below the character's."""


@dataclass(frozen=True)
class Batch:
    """Pages of one size with their texts, padded on the right. Shapes: b pages, n text places, s patches a side."""

    pages: Tensor
    """uint8 [b, S, S]."""
    ids: Tensor
    """int64 [b, n]: the text's tokens, the end marker, padding."""
    is_text: Tensor
    """bool [b, n]: False on padding."""
    columns: Tensor
    rows: Tensor
    """int64 [b, n]: patch column and row of the place that each token is read from; clamped to the page."""
    patch_chars: Tensor
    """int64 [b, s, s]: byte value of the character that a patch shows, 0 for paper, `IGNORED` when in doubt."""
    cell_chars: Tensor
    """int64 [b, s, s]: the same with spaces, with newlines behind their lines, and `PAGE_END` behind the last one."""

    @classmethod
    def from_pages(cls, pages: Sequence[Page], sizes: NanoConfig = NANO) -> Self:
        """Collate pages of `sizes.image_size` pixels."""
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
        return cls(
            pages=torch.from_numpy(np.stack([page.pixels for page in pages])),
            ids=torch.from_numpy(ids),
            is_text=torch.from_numpy(ids != PAD_ID),
            columns=torch.from_numpy(places[0]),
            rows=torch.from_numpy(places[1]),
            patch_chars=torch.from_numpy(np.stack([_label_patches(page, sizes, "") for page in pages])),
            cell_chars=torch.from_numpy(np.stack([_label_patches(page, sizes, " \n") for page in pages])),
        )


def _encode_page(page: Page) -> list[int]:
    """Return the tokens of an ASCII page: every space says its column, every newline the line it leads to."""
    tokens = encode_text(page.text)
    for index, (char, (x, _)) in enumerate(zip(page.text, page.centers.tolist(), strict=True)):
        if char == " ":
            tokens[index] = FIRST_COLUMN_ID + int(x) // PITCH_PX
        elif char == "\n":
            tokens[index] = FIRST_LINE_ID + int(page.centers[index + 1, 1]) // LINE_PX
    return tokens


def _label_patches(page: Page, sizes: NanoConfig, whitespace: str) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return what each patch shows, [s, s]: printed characters, those in `whitespace`, and then also the page's end."""
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
