"""What the encoder is taught, through read-outs that are not part of the checkpoint.

A place of the page is read from the vision token that shows it, given where in the token it is; the same question is
asked of the SAM-style patches. Vision tokens further tell where on the page they are, and whitespace where it leads to.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.nano.config import NanoConfig
from serving.nano.print_tokens import NUM_BINS
from serving.nano.training.batches import NEWLINE, NONE, NUM_CLASSES, SPACE, Batch
from serving.nano.training.encoder import EncodedPages
from serving.nano.training.initial import place_channels

_PATCH_WIDTH = 48
_SLOT_WIDTH = 64
_HIDDEN = 128
SLOTS = 8
"""Slots along a side of a vision token, eight pixels each."""
_CENTER_NOISE_PX = 1.0
_CELL_JITTER_PX = 5.0
_PADDED_TO = 256
"""Questions are padded to a multiple, so that few shapes occur."""


@dataclass(frozen=True)
class EncoderWeights:
    """Weight of every term."""

    cells: float = 1.0
    patches: float = 0.5
    blanks: float = 0.3
    places: float = 0.2
    goals: float = 0.15


@dataclass(frozen=True)
class Questions:
    """Places of a batch's pages that are asked about. k questions."""

    page: Tensor
    """int64 [k]: the page in the batch."""
    at: Tensor
    """float32 [k, 2]: x and y in pixels."""
    cell: Tensor
    """int64 [k]: which vision token is asked, counted over the page in reading order."""
    wanted: Tensor
    """int64 [k]: what stands there."""
    goals: Tensor
    """float32 [k, 2]: where whitespace leads to."""
    weight: Tensor
    """float32 [k]: 0 for padding."""


def _slot_reader(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(_SLOT_WIDTH), nn.Linear(_SLOT_WIDTH, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, classes)
    )


def _mix_corners(table: Tensor, first: Tensor, columns: int, u: Tensor, v: Tensor, last: int) -> Tensor:
    """Return rows of a table [n, c] mixed bilinearly at columns `u` and rows `v` of grids that start at row `first`.

    Grids have `last` + 1 slots a side, `columns` rows of the table from one row of slots to the next.
    """
    table = table.float()
    u, v = u.clamp(0, last), v.clamp(0, last)
    left, top = u.floor().clamp(max=last - 1), v.floor().clamp(max=last - 1)
    share_u, share_v = (u - left)[:, None], (v - top)[:, None]
    corner = first + top.long() * columns + left.long()
    upper = torch.lerp(table[corner], table[corner + 1], share_u)
    lower = torch.lerp(table[corner + columns], table[corner + columns + 1], share_u)
    return torch.lerp(upper, lower, share_v)


class Readouts(nn.Module):
    """Reads places from vision tokens and from patches."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.sizes = sizes
        self.cell_patches = nn.Linear(sizes.hidden_size, 16 * _PATCH_WIDTH)
        self.cell_slots = nn.Linear(_PATCH_WIDTH, 4 * _SLOT_WIDTH)
        self.cell_class = _slot_reader(NUM_CLASSES)
        self.goal = nn.Linear(_SLOT_WIDTH, 2 * NUM_BINS)
        self.place = nn.Linear(sizes.hidden_size, 2 * sizes.grid_side)
        self.patch_slots = nn.Linear(sizes.sam_width, 4 * _SLOT_WIDTH)
        self.patch_class = _slot_reader(NUM_CLASSES)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Let the maps to patches pick what the encoder's start gives to each, alike for all."""
        weight = self.cell_patches.weight.view(16, _PATCH_WIDTH, -1)
        nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.cell_patches.bias)
        for place in range(16):
            channels = place_channels(place // 4, place % 4, self.sizes.downsample_channels[1])
            count = min(_PATCH_WIDTH, channels.stop - channels.start)
            weight[place, :count, channels.start : channels.start + count] += torch.eye(count)

    def slots_of_cells(self, cells: Tensor) -> Tensor:
        """Map vision tokens [b, g * g, hidden] to slots [b * g * g * 64, c], 8 rows of 8 for each token."""
        patches = self.cell_patches(cells).view(-1, 4, 4, _PATCH_WIDTH)
        slots = self.cell_slots(patches).view(-1, 4, 4, 2, 2, _SLOT_WIDTH)
        return slots.permute(0, 1, 3, 2, 4, 5).reshape(-1, _SLOT_WIDTH)

    def read_cells(self, cells: Tensor, asked: Questions) -> tuple[Tensor, Tensor]:
        """Return the logits of classes [k, classes], and the slots [k, c] that they were read from."""
        side, size = self.sizes.grid_side, self.sizes.cell_size
        row, column = asked.cell // side, asked.cell % side
        u = (asked.at[:, 0] - column * size) * (SLOTS / size) - 0.5
        v = (asked.at[:, 1] - row * size) * (SLOTS / size) - 0.5
        first = (asked.page * side * side + asked.cell) * SLOTS**2
        slots = _mix_corners(self.slots_of_cells(cells), first, SLOTS, u, v, SLOTS - 1)
        return self.cell_class(slots), slots

    def read_patches(self, patches: Tensor, asked: Questions) -> Tensor:
        """Return the logits of classes [k, classes] from SAM features [b, s, s, width]."""
        b, side, _, _ = patches.shape
        slots = self.patch_slots(patches).view(b, side, side, 2, 2, _SLOT_WIDTH).transpose(2, 3)
        table = slots.reshape(-1, _SLOT_WIDTH)
        u, v = (asked.at * (2 / self.sizes.patch_size) - 0.5).unbind(1)
        return self.patch_class(_mix_corners(table, asked.page * 4 * side * side, 2 * side, u, v, 2 * side - 1))


def ask(batch: Batch, sizes: NanoConfig, *, is_noisy: bool = True) -> Questions:
    """Return a question for every character, whitespace and end, and for the blank places."""
    page, place = batch.is_text.nonzero(as_tuple=True)
    at = torch.cat([batch.centers[page, place], batch.blanks.flatten(0, 1)])
    count, num_blanks = len(page), batch.blanks.shape[1]
    page = torch.cat([page, torch.arange(len(batch.pages)).repeat_interleave(num_blanks)])
    wanted = torch.cat([batch.classes[page[:count], place], torch.full((len(page) - count,), NONE)])
    goals = torch.cat([batch.goals[page[:count], place], at[count:]])
    weight = torch.ones(len(page))
    padding = -len(page) % _PADDED_TO
    page, wanted, weight = (F.pad(x, (0, padding)) for x in (page, wanted, weight))
    at, goals = (F.pad(x, (0, 0, 0, padding)) for x in (at, goals))
    seen = at
    if is_noisy:
        at = at + _CENTER_NOISE_PX * torch.randn(at.shape)
        seen = at + _CELL_JITTER_PX * (2 * torch.rand(at.shape) - 1)
    steps = (seen / sizes.cell_size).floor().long().clamp(0, sizes.grid_side - 1)
    return Questions(page, at, steps[:, 1] * sizes.grid_side + steps[:, 0], wanted, goals, weight)


def _bins(goals: Tensor, sizes: NanoConfig) -> Tensor:
    return (goals * (NUM_BINS / sizes.image_size)).floor().long().clamp(0, NUM_BINS - 1)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1)


def _read_loss(logits: Tensor, asked: Questions, blank_weight: float) -> tuple[Tensor, Tensor]:
    """Return the loss, and the share of printed characters that are read right."""
    losses = F.cross_entropy(logits.float(), asked.wanted, reduction="none")
    is_blank = asked.wanted == NONE
    shown = asked.weight * ~is_blank
    loss = _mean(losses, shown) + blank_weight * _mean(losses, asked.weight * is_blank)
    is_right = (logits.argmax(-1) == asked.wanted).float()
    return loss, _mean(is_right, asked.weight * (asked.wanted < SPACE))


def encoder_losses(
    encoded: EncodedPages, readouts: Readouts, batch: Batch, weights: EncoderWeights, *, with_patches: bool = True
) -> dict[str, Tensor]:
    """Return the weighted terms, and the accuracies `read` (vision tokens) and `seen` (patches)."""
    sizes = readouts.sizes
    asked = ask(batch, sizes)
    logits, slots = readouts.read_cells(encoded.cells, asked)
    cells, read = _read_loss(logits, asked, weights.blanks)
    terms = {"cells": weights.cells * cells, "read": read}
    if with_patches:
        patches, seen = _read_loss(readouts.read_patches(encoded.patches, asked), asked, weights.blanks)
        terms |= {"patches": weights.patches * patches, "seen": seen}
    columns, rows = readouts.place(encoded.cells).float().chunk(2, -1)
    steps = torch.arange(sizes.grid_side)
    wanted_rows = steps.repeat_interleave(sizes.grid_side).expand(len(batch.pages), -1)
    wanted_columns = steps.repeat(sizes.grid_side).expand(len(batch.pages), -1)
    places = F.cross_entropy(columns.flatten(0, 1), wanted_columns.flatten())
    places = places + F.cross_entropy(rows.flatten(0, 1), wanted_rows.flatten())
    terms["places"] = weights.places * places
    with torch.no_grad():
        is_right = (columns.argmax(-1) == wanted_columns) & (rows.argmax(-1) == wanted_rows)
        terms["placed"] = is_right.float().mean()
    terms["goals"] = weights.goals * _goal_loss(readouts.goal(slots), asked, sizes)
    return terms


def _goal_loss(logits: Tensor, asked: Questions, sizes: NanoConfig) -> Tensor:
    """Return the loss of telling where whitespace leads to: a space a column, a newline a column and a height."""
    columns, rows = logits.float().chunk(2, -1)
    wanted = _bins(asked.goals, sizes)
    is_line = asked.weight * (asked.wanted == NEWLINE)
    is_gap = is_line + asked.weight * (asked.wanted == SPACE)
    across = F.cross_entropy(columns, wanted[:, 0], reduction="none")
    down = F.cross_entropy(rows, wanted[:, 1], reduction="none")
    return _mean(across, is_gap) + _mean(down, is_line)
