"""What the decoder is taught beside the next token: where that is, and which heads look there.

The first two layers find the place of the next character and write its code into the residual stream; the heads of the
last two bring what stands there. A vision token shows sixteen patches: head h of the layer before the last reads the
h-th column of its upper half, head h of the last layer that of the lower half, and looks at the start marker when it is
another's turn. The experts are taught to be one for each patch of a vision token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.nano.config import NanoConfig
from serving.nano.print_tokens import FIRST_CHAR_ID, FIRST_COLUMN_ID, FIRST_HEIGHT_ID, NUM_BINS, NUM_PHASES, VOCAB_SIZE
from serving.nano.tokenizer import EOS_ID
from serving.nano.training.batches import IGNORED, Batch
from serving.nano.training.decoder import DecoderTrace
from serving.nano.training.families import PLACE_WIDTH, place_code

PLACED_AFTER = 1
"""The layer behind which the place code stands in the residual stream."""
_SOFT_BINS = 0.7
_GUIDED_ROWS = 64
"""Text places per page on which attention is guided; a sample is enough and much cheaper."""


@dataclass(frozen=True)
class DecoderWeights:
    """Weight of every term, and how the text that the decoder is told is spoilt."""

    tokens: float = 1.0
    chars: float = 1.0
    early: float = 0.3
    """Of both, read behind the layer before the last."""
    places: float = 0.15
    code: float = 0.5
    attention: float = 0.3
    router: float = 0.1
    shifted: float = 0.15
    """Share of the tokens told with a place that is off by one bin."""
    wrong: float = 0.03
    """Share of the printed characters told wrongly."""


class PlaceGuides(nn.Module):
    """Read-outs of the next place behind the first layers: 64 bins of x and y, 8 of each within a vision token."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        count = 2 * NUM_BINS + 2 * NUM_PHASES
        self.heads = nn.ModuleList(nn.Linear(sizes.hidden_size, count) for _ in range(3))


@dataclass(frozen=True)
class Places:
    """Where each of a batch's tokens stands, [b, n] each."""

    at: Tensor
    """float32 [b, n, 2]: pixels."""
    cell: Tensor
    """int64: position in the prompt of the vision token that shows it."""
    line_cell: Tensor
    """int64: the same for the first character of the token's line."""
    region: Tensor
    """int64: which of the vision token's sixteen patches."""

    @classmethod
    def of(cls, batch: Batch, sizes: NanoConfig) -> "Places":
        """Return the places of a batch."""
        at = batch.centers
        steps = (at / sizes.cell_size).floor().long().clamp(0, sizes.grid_side - 1)
        cell = 1 + steps[..., 1] * (sizes.grid_side + 1) + steps[..., 0]
        inner = ((at - steps * sizes.cell_size) / sizes.patch_size).floor().long().clamp(0, 3)
        line_start = last_before(is_newline(batch.ids)) + 1
        return cls(at, cell, cell.gather(1, line_start), inner[..., 1] * 4 + inner[..., 0])


def is_newline(ids: Tensor) -> Tensor:
    """Tell which tokens are newlines."""
    return (ids >= FIRST_HEIGHT_ID) & (ids < FIRST_COLUMN_ID)


def is_whitespace(ids: Tensor) -> Tensor:
    """Tell which tokens are newlines or spaces."""
    return (ids >= FIRST_HEIGHT_ID) & (ids < FIRST_CHAR_ID)


def last_before(marks: Tensor) -> Tensor:
    """Return for every place [b, n] the last marked one before it, -1 where there is none."""
    steps = torch.arange(marks.shape[1]).expand_as(marks)
    last = steps.masked_fill(~marks, -1).cummax(1).values
    return F.pad(last[:, :-1], (1, 0), value=-1)


def spoil(ids: Tensor, weights: DecoderWeights) -> Tensor:
    """Shift the place of some tokens by a bin and change some characters: reading goes on from mistakes as well."""
    is_char = ids >= FIRST_CHAR_ID
    is_placed = ids >= FIRST_HEIGHT_ID
    size = torch.where(is_char, NUM_PHASES, NUM_BINS)
    first = torch.where(is_char, ids - (ids - FIRST_CHAR_ID) % NUM_PHASES, FIRST_HEIGHT_ID)
    first = torch.where((ids >= FIRST_COLUMN_ID) & ~is_char, FIRST_COLUMN_ID, first)
    step = torch.randint(0, 2, ids.shape) * 2 - 1
    shifted = ids - first + step
    # Within a vision token phases go round; at a page's edge there is no next bin.
    shifted = first + torch.where(is_char, shifted % NUM_PHASES, shifted.clamp(min=0).minimum(size - 1))
    ids = torch.where(is_placed & (torch.rand(ids.shape) < weights.shifted), shifted, ids)
    others = torch.randint(FIRST_CHAR_ID, VOCAB_SIZE, ids.shape)
    return torch.where(is_char & (torch.rand(ids.shape) < weights.wrong), others, ids)


def overwrite_places(residual: Tensor, code: Tensor, is_told: Tensor, start: int) -> Tensor:
    """Write the true code [b, n, 64] into the text places of the pages that are told, from position `start` on."""
    stop = start + code.shape[1]
    text = residual[:, start:stop, -PLACE_WIDTH:]
    told = torch.where(is_told[:, None, None], code.to(text.dtype), text)
    middle = torch.cat([residual[:, start:stop, :-PLACE_WIDTH], told], -1)
    return torch.cat([residual[:, :start], middle, residual[:, stop:]], 1)


def class_logits(logits: Tensor) -> Tensor:
    """Map logits of tokens to logits of what they stand for: characters, space, newline, end; [..., classes - 1]."""
    chars = logits[..., FIRST_CHAR_ID:].unflatten(-1, (-1, NUM_PHASES)).logsumexp(-1)
    spaces = logits[..., FIRST_COLUMN_ID:FIRST_CHAR_ID].logsumexp(-1, keepdim=True)
    lines = logits[..., FIRST_HEIGHT_ID:FIRST_COLUMN_ID].logsumexp(-1, keepdim=True)
    return torch.cat([chars, spaces, lines, logits[..., EOS_ID : EOS_ID + 1]], -1)


def text_losses(logits: Tensor, batch: Batch, weights: DecoderWeights) -> tuple[Tensor, Tensor]:
    """Return the loss of tokens [b, n, vocabulary] and of what they stand for, and which tokens' text is right."""
    logits = logits.float()
    wanted = batch.ids.masked_fill(~batch.is_text, IGNORED)
    tokens = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    by_class = class_logits(logits)
    classes = batch.classes.masked_fill(~batch.is_text, IGNORED)
    chars = F.cross_entropy(by_class.flatten(0, 1), classes.flatten(), ignore_index=IGNORED)
    return weights.tokens * tokens + weights.chars * chars, (by_class.argmax(-1) == batch.classes) & batch.is_text


def _soft_loss(logits: Tensor, at: Tensor, is_text: Tensor) -> Tensor:
    """Return the loss of telling `at` [b, n], in bins, softly: the next bin is nearly right."""
    bins = torch.arange(logits.shape[-1]) + 0.5
    wanted = (-(((at[..., None] - bins) / _SOFT_BINS) ** 2) / 2).softmax(-1)
    losses = -(wanted * logits.log_softmax(-1)).sum(-1)
    return (losses * is_text).sum() / is_text.sum()


def place_losses(trace: DecoderTrace, guides: PlaceGuides, places: Places, batch: Batch, start: int) -> Tensor:
    """Return the loss of telling the next place behind the first three layers; `start` gives the first token."""
    stop = start + batch.ids.shape[1]
    total = places.at.new_zeros(())
    for residual, head in zip(trace.residuals, guides.heads, strict=False):
        x, y, dx, dy = head(residual[:, start:stop]).float().split([NUM_BINS] * 2 + [NUM_PHASES] * 2, -1)
        for logits, at in ((x, places.at[..., 0] / 8), (y, places.at[..., 1] / 8)):
            total = total + _soft_loss(logits, at, batch.is_text)
        for logits, at in ((dx, places.at[..., 0] % 64 / 8), (dy, places.at[..., 1] % 64 / 8)):
            total = total + 0.5 * _soft_loss(logits, at, batch.is_text)
    return total


def code_loss(trace: DecoderTrace, places: Places, batch: Batch, start: int) -> Tensor:
    """Return how far the place code that the first layers wrote is from the true one."""
    stop = start + batch.ids.shape[1]
    written = trace.residuals[PLACED_AFTER][:, start:stop, -PLACE_WIDTH:].float()
    errors = (written - place_code(places.at)).square().mean(-1)
    return (errors * batch.is_text).sum() / batch.is_text.sum()


def router_loss(trace: DecoderTrace, places: Places, batch: Batch, start: int) -> Tensor:
    """Return the loss of sending a place to the expert of its patch."""
    stop = start + batch.ids.shape[1]
    wanted = places.region.masked_fill(~batch.is_text, IGNORED).flatten()
    parts = [
        F.cross_entropy(logits[:, start:stop].float().flatten(0, 1), wanted, ignore_index=IGNORED)
        for logits in trace.router_logits
    ]
    return torch.stack(parts).sum()


def attention_losses(trace: DecoderTrace, places: Places, batch: Batch, start: int) -> tuple[Tensor, Tensor]:
    """Return how little the heads look where they should, and the share of attention on the right vision token.

    Head 0 of the first layer looks at the last newline, head 1 at the last whitespace; heads 0 and 1 of the second at
    the characters since, and head 2 at the vision token of the line's first character; the last two layers' as above.
    """
    b, n = batch.ids.shape
    picks = torch.randint(n, (b, _GUIDED_ROWS))
    valid = batch.is_text.gather(1, picks).float()
    at = start + picks

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum().clamp(min=1)

    # The input of position start + i is token i - 1; where there is no newline yet, the prompt's last token.
    newline = (start + 1 + last_before(is_newline(batch.ids))).gather(1, picks)
    white = (start + 1 + last_before(is_whitespace(batch.ids))).gather(1, picks)
    cell, line_cell, region = (x.gather(1, picks) for x in (places.cell, places.line_cell, places.region))
    logs = _attention_logs(trace.queries[0], trace.keys[0], at)
    loss = -mean(_pick(logs[:, 0], newline), valid) - mean(_pick(logs[:, 1], white), valid)
    logs = _attention_logs(trace.queries[1], trace.keys[1], at)
    is_before = torch.arange(logs.shape[-1]) < white[..., None]
    since = logs[:, :2].masked_fill(is_before[:, None], -1e9).logsumexp(-1).mean(1)
    loss = loss - mean(since, valid) - mean(_pick(logs[:, 2], line_cell), valid)
    reading = loss.new_zeros(())
    heads = torch.arange(trace.queries[-1].shape[1])[:, None]
    for half, (queries, keys) in enumerate(zip(trace.queries[-2:], trace.keys[-2:], strict=True)):
        is_turn = (region[:, None] % 4 == heads) & (region[:, None] // 8 == half)
        logs = _attention_logs(queries, keys, at)
        on_target = _pick(logs, cell[:, None] * is_turn)
        on_turn = is_turn * valid[:, None]
        loss = loss - mean(on_target, on_turn) - mean(on_target, ~is_turn * valid[:, None])
        reading = reading + (on_target.detach().exp() * on_turn).sum() / valid.sum()
    return loss, reading


def _pick(logs: Tensor, index: Tensor) -> Tensor:
    return logs.gather(-1, index[..., None])[..., 0]


def _attention_logs(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """Return the logarithms of attention [b, heads, r, n] at the chosen places [b, r]."""
    index = places[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
    scores = torch.matmul(queries.gather(2, index), keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
    is_future = torch.arange(keys.shape[2]) > places[:, None, :, None]
    return scores.masked_fill(is_future, -1e9).log_softmax(-1)
