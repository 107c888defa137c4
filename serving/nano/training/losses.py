"""What training minimises: the next character, and crutches that are thrown away afterwards.

The crutches teach what the text alone teaches slowly: which character a patch shows, where on the page the next one is,
and which heads of the last layers should look there. They hang on linear read-outs that are not part of the checkpoint.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.nano.config import NanoConfig
from serving.nano.tokenizer import EOS_ID, FIRST_COLUMN_ID, FIRST_LINE_ID
from serving.nano.training.batches import IGNORED, PAGE_END, Batch
from serving.nano.training.decoder import DecoderTrace
from serving.nano.training.encoder import EncodedPages

_NUM_BYTES = 128
_SLOT_WIDTH = 48
_GUIDED_ROWS = 48
"""Text places per page on which attention is guided; a sample is enough and much cheaper."""


@dataclass(frozen=True)
class LossWeights:
    """Weight of every term of the training loss."""

    text: float = 1.0
    patches: float = 0.5
    cells: float = 1.0
    more: float = 0.3
    places: float = 0.15
    attention: float = 0.3
    balance: float = 0.01
    line_turn: float = 4.0
    end_turn: float = 10.0
    """How often newlines and the end count: they are few among letters and alone decide whether a line is lost or a
    page read twice. Once all else is learnt this makes the reader take wide gaps for them."""
    end_label: float = 8.0
    """How often the page's end counts among what vision tokens say."""


class TrainingHeads(nn.Module):
    """Read-outs for the crutches."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.patch_char = nn.Linear(sizes.sam_width, _NUM_BYTES)
        self.cell_slots = nn.Linear(sizes.hidden_size, 16 * _SLOT_WIDTH)
        self.slot_char = nn.Linear(_SLOT_WIDTH, _NUM_BYTES)
        self.more = nn.Linear(sizes.hidden_size, 4)
        self.places = nn.ModuleList(nn.Linear(sizes.hidden_size, 2 * sizes.sam_side) for _ in range(2))

    def read_cells(self, cells: Tensor) -> Tensor:
        """Map vision tokens [b, g * g, hidden] to character logits of their patches, [b, 4g, 4g, 128]."""
        b, count, _ = cells.shape
        side = round(count**0.5)
        slots = self.cell_slots(cells).view(b, side, side, 4, 4, _SLOT_WIDTH).transpose(2, 3)
        return self.slot_char(slots.reshape(b, 4 * side, 4 * side, _SLOT_WIDTH))


def _char_loss(logits: Tensor, labels: Tensor, end_label: float) -> tuple[Tensor, Tensor]:
    """Return the loss over labelled patches, with paper counting for less, and the accuracy on all but paper."""
    flat, wanted = logits.float().flatten(0, -2), labels.flatten()
    losses = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="none")
    is_print, is_paper = wanted > 0, wanted == 0
    shares = is_print + (end_label - 1) * (wanted == PAGE_END)
    loss = (losses * shares).sum() / is_print.sum().clamp(min=1)
    loss = loss + 0.2 * (losses * is_paper).sum() / is_paper.sum().clamp(min=1)
    with torch.no_grad():
        right = ((flat.argmax(-1) == wanted) & is_print).sum() / is_print.sum().clamp(min=1)
    return loss, right


def encoder_losses(
    encoded: EncodedPages, heads: TrainingHeads, batch: Batch, weights: LossWeights
) -> dict[str, Tensor]:
    """Return the weighted terms `patches`, `cells`, `more`, and the accuracies `seen` (patches) and `read` (cells)."""
    patches, seen = _char_loss(heads.patch_char(encoded.patches), batch.patch_chars, weights.end_label)
    cells, right = _char_loss(heads.read_cells(encoded.cells), batch.cell_chars, weights.end_label)
    more = _more_loss(heads.more(encoded.cells), batch)
    terms = {"patches": weights.patches * patches, "cells": weights.cells * cells, "more": weights.more * more}
    return terms | {"seen": seen, "read": right}


def _more_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the loss of every vision token telling whether text follows below each of its two lines.

    The end of the page can then be told at any place of a line, even when the line leaves no paper behind it.
    """
    b, rows, _ = batch.is_more.shape
    scores = logits.float().view(b, rows, rows, 2, 2)
    wanted = batch.is_more[:, :, None].expand(-1, -1, rows, -1)
    losses = F.cross_entropy(scores.flatten(0, 3), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    is_known = (wanted != IGNORED).flatten()
    is_near = batch.is_near_end[:, :, None].expand_as(wanted).flatten()
    return losses.sum() / is_known.sum() + (losses * is_near).sum() / is_near.sum().clamp(min=1)


def text_loss(logits: Tensor, batch: Batch, weights: LossWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss per text place of [b, n, vocabulary] and the shares of right guesses: of all and of turns.

    Turns are newlines and ends.
    """
    wanted = batch.ids.masked_fill(~batch.is_text, IGNORED)
    losses = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    is_end = batch.ids == EOS_ID
    is_line = (batch.ids >= FIRST_LINE_ID) & (batch.ids < FIRST_COLUMN_ID)
    counts = 1 + (weights.line_turn - 1) * is_line + (weights.end_turn - 1) * is_end
    loss = (losses * counts.flatten()).sum() / batch.is_text.sum()
    with torch.no_grad():
        is_right = logits.argmax(-1) == batch.ids
        right = (is_right & batch.is_text).sum() / batch.is_text.sum()
        turned = (is_right & (is_end | is_line)).sum() / (is_end | is_line).sum()
    return loss, right, turned


def place_loss(trace: DecoderTrace, heads: TrainingHeads, batch: Batch, start: int) -> Tensor:
    """Return the loss of telling the next place's column and line on the page's grid after the first layers.

    `start` is the position whose output is the first text token.
    """
    stop = start + batch.ids.shape[1]
    total = batch.ids.new_zeros((), dtype=torch.float32)
    for residual, head in zip(trace.residuals, heads.places, strict=False):
        columns, rows = head(residual[:, start:stop]).float().chunk(2, -1)
        for logits, wanted in ((columns, batch.columns), (rows, batch.rows // 2)):
            labels = wanted.masked_fill(~batch.is_text, IGNORED).flatten()
            total = total + F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)
    return total


def attention_loss(trace: DecoderTrace, batch: Batch, start: int) -> Tensor:
    """Return how little the last two layers' heads look where they should.

    A cell of a native page shows four characters on each of two lines. Head h of the layer before the last is to read
    the h-th character of a cell's upper line, head h of the last layer that of the lower line, and to look at the start
    marker when it is another's turn. So one linear map per head has to bring out one character. Views of other sizes
    show fewer characters per cell, in the rooms they have on a native page, and turns are the same.
    """
    picks = torch.randint(batch.ids.shape[1], (len(batch.ids), _GUIDED_ROWS))
    rows, columns = batch.rows.gather(1, picks), batch.columns.gather(1, picks)
    cells = 1 + batch.targets.gather(1, picks)
    valid = batch.is_text.gather(1, picks)[:, None]
    total = batch.ids.new_zeros((), dtype=torch.float32)
    for line, (queries, keys) in enumerate(zip(trace.queries[-2:], trace.keys[-2:], strict=True)):
        heads = torch.arange(queries.shape[1])[:, None]
        is_turn = (columns[:, None] % 4 == heads) & (rows[:, None] // 2 % 2 == line)
        logs = _attention_logs(queries, keys, start + picks)
        on_target = logs.gather(-1, (cells[:, None] * is_turn)[..., None])[..., 0]
        for group in (is_turn & valid, ~is_turn & valid):
            total = total - (on_target * group).sum() / group.sum().clamp(min=1)
    return total


def _attention_logs(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """Return the logarithms of attention [b, heads, r, n] at the chosen places [b, r]."""
    index = places[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
    scores = torch.matmul(queries.gather(2, index), keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
    is_future = torch.arange(keys.shape[2]) > places[:, None, :, None]
    return scores.masked_fill(is_future, -1e9).log_softmax(-1)


def balance_loss(logits: Tensor) -> Tensor:
    """Return the usual load-balancing term: 1 when every expert gets the same share of tokens."""
    scores = logits.softmax(-1).flatten(0, -2)
    share = F.one_hot(scores.argmax(-1), scores.shape[-1]).float().mean(0)
    return scores.shape[-1] * (share * scores.mean(0)).sum()
