"""Batches of pages of free print with everything that the training losses look at, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from serving.nano.pages import GreyPage
from serving.nano.print_tokens import PRINTABLE, PlacedChar, encode_page
from serving.nano.texts import Random
from serving.nano.tokenizer import EOS_ID, PAD_ID, encode_text
from serving.nano.training.print_pages import PrintPage

OCR_PROMPT = encode_text("\nFree OCR.")
IGNORED = -100

SPACE, NEWLINE, END, NONE = range(len(PRINTABLE), len(PRINTABLE) + 4)
"""What a place may show beside the printable characters: whitespace by what it is, the page's end, nothing."""
NUM_CLASSES = len(PRINTABLE) + 4

_PADDED_TO = 64
"""Texts are padded to a multiple: oneDNN builds kernels for every shape that it meets."""
_NUM_BLANKS = 24
"""Places a page that show nothing and are asked about."""


def resize_view(pixels: GreyPage, side_px: int) -> GreyPage:
    """Return a square page as a view of `side_px` pixels: what every mode makes of it, nothing being padded or cut."""
    if pixels.shape == (side_px, side_px):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC))


def class_of(char: str) -> int:
    """Return the class of a character of a page's text."""
    return {" ": SPACE, "\n": NEWLINE}.get(char, PRINTABLE.find(char))


@dataclass(frozen=True)
class Batch:
    """Pages of one size with their texts, padded on the right. b pages, n text places."""

    pages: Tensor
    """uint8 [b, S, S]."""
    ids: Tensor
    """int64 [b, n]: the text's tokens, the end marker, padding."""
    is_text: Tensor
    """bool [b, n]: False on padding."""
    classes: Tensor
    """int64 [b, n]: what stands at each place, 0 on padding."""
    centers: Tensor
    """float32 [b, n, 2]: x and y of each token's place, in pixels; whitespace stands behind the character before it."""
    goals: Tensor
    """float32 [b, n, 2]: where whitespace leads to, the centre of the next printed character; elsewhere `centers`."""
    blanks: Tensor
    """float32 [b, k, 2]: places that show nothing."""

    @classmethod
    def from_pages(cls, pages: Sequence[PrintPage], random: Random) -> Self:
        """Collate pages of one size; `random` chooses the blank places."""
        longest = max(len(page.text) for page in pages) + 1
        width = -(-longest // _PADDED_TO) * _PADDED_TO
        ids = np.full((len(pages), width), PAD_ID, np.int64)
        classes = np.zeros((len(pages), width), np.int64)
        centers = np.zeros((len(pages), width, 2), np.float32)
        goals = np.zeros((len(pages), width, 2), np.float32)
        for row, page in enumerate(pages):
            count, side = len(page.text), page.pixels.shape[0]
            ids[row, : count + 1] = [*encode_print(page), EOS_ID]
            classes[row, : count + 1] = [*map(class_of, page.text), END]
            centers[row, : count + 1] = np.clip(page.centers, 0, side - 1)
            goals[row, : count + 1] = _goals(page, centers[row, : count + 1])
        blanks = np.stack([_sample_blanks(page, random) for page in pages])
        return cls(
            pages=torch.from_numpy(np.stack([page.pixels for page in pages])),
            ids=torch.from_numpy(ids),
            is_text=torch.from_numpy(ids != PAD_ID),
            classes=torch.from_numpy(classes),
            centers=torch.from_numpy(centers),
            goals=torch.from_numpy(goals),
            blanks=torch.from_numpy(blanks),
        )


def encode_print(page: PrintPage) -> list[int]:
    """Return the tokens of a page."""
    side = page.pixels.shape[0]
    places = np.clip(page.centers, 0, side - 1).tolist()
    return encode_page([PlacedChar(char, x, y) for char, (x, y) in zip(page.text, places, strict=False)], side)


def _goals(page: PrintPage, centers: NDArray[np.float32]) -> NDArray[np.float32]:
    goals = centers.copy()
    places = [index for index, char in enumerate(page.text) if char in " \n"]
    goals[places] = centers[np.array(places, np.int64) + 1]
    return goals


def _sample_blanks(page: PrintPage, random: Random) -> NDArray[np.float32]:
    """Return places that are farther from any character's than a character is wide and high."""
    reach = np.array([0.7, 0.75], np.float32) * page.setting.size_px
    places = random.uniform(0, page.pixels.shape[0], (4 * _NUM_BLANKS, 2)).astype(np.float32)
    is_near = (np.abs(places[:, None] - page.centers) < reach).all(2).any(1)
    # Stable: the blank ones first. A page without any asks about the corner of its margin.
    order = np.argsort(is_near, kind="stable")[:_NUM_BLANKS]
    return np.where(is_near[order, None], np.float32(0), places[order])
