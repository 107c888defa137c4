"""What the tokens of one character, and of one place, have in common.

A character is eight tokens, whitespace 64. In training each of their rows, of the embedding and of the output layer, is
a sum: of the token's own, of its character's and of its place's, so that what is learnt from one serves all. The sums
are the rows of the checkpoint.
"""

import math

import torch
from torch import Tensor, nn

from serving.nano.config import NanoConfig
from serving.nano.print_tokens import FIRST_CHAR_ID, FIRST_COLUMN_ID, FIRST_HEIGHT_ID, NUM_BINS, NUM_PHASES, VOCAB_SIZE
from serving.nano.tokenizer import EOS_ID
from serving.nano.training.batches import END, NEWLINE, NUM_CLASSES, SPACE

PLACE_WIDTH = 64
"""The last dimensions of the residual stream: sines of where the next character is."""
_HARMONICS = tuple(1024 / k for k in range(1, 13)) + tuple(64 / k for k in range(1, 5))
"""Wavelengths in pixels, of which each axis has a sine and a cosine."""


def place_code(at: Tensor) -> Tensor:
    """Return the code [..., 64] of places [..., 2] in pixels: 32 dimensions for x, 32 for y."""
    rates = 2 * math.pi / torch.tensor(_HARMONICS)
    angles = at[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def classes_of_tokens() -> Tensor:
    """Return the class of each token, `NUM_CLASSES` for tokens without one, [vocabulary]."""
    classes = torch.full((VOCAB_SIZE,), NUM_CLASSES)
    classes[EOS_ID] = END
    classes[FIRST_HEIGHT_ID:FIRST_COLUMN_ID] = NEWLINE
    classes[FIRST_COLUMN_ID:FIRST_CHAR_ID] = SPACE
    classes[FIRST_CHAR_ID:] = torch.arange(VOCAB_SIZE - FIRST_CHAR_ID) // NUM_PHASES
    return classes


class TokenFamilies(nn.Module):
    """Adds to the rows of embedding and output layer what their families share."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.in_class = nn.Parameter(0.4 * torch.randn(NUM_CLASSES, width))
        self.in_phase = nn.Parameter(0.2 * torch.randn(NUM_PHASES, width))
        self.out_class = nn.Parameter(0.02 * torch.randn(NUM_CLASSES, width))
        self.out_phase = nn.Parameter(0.02 * torch.randn(NUM_PHASES, width))
        classes = classes_of_tokens()
        phases = torch.full((VOCAB_SIZE,), NUM_PHASES)
        phases[FIRST_CHAR_ID:] = torch.arange(VOCAB_SIZE - FIRST_CHAR_ID) % NUM_PHASES
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("phases", phases, persistent=False)

    def _rows(self, by_class: Tensor, by_phase: Tensor) -> Tensor:
        nothing = by_class.new_zeros(1, by_class.shape[1])
        return torch.cat([by_class, nothing])[self.classes] + torch.cat([by_phase, nothing])[self.phases]

    def inputs(self, weight: Tensor) -> Tensor:
        """Return the embedding's rows, [vocabulary, hidden]."""
        return weight + self._rows(self.in_class, self.in_phase)

    def outputs(self, weight: Tensor) -> Tensor:
        """Return the output layer's rows, [vocabulary, hidden]."""
        return weight + self._rows(self.out_class, self.out_phase)


@torch.no_grad()
def start_tokens(embedding: Tensor, output: Tensor) -> None:
    """Draw the tokens' own rows: small, and in the dimensions of the place code the place that they name."""
    width = embedding.shape[1] - PLACE_WIDTH
    embedding[FIRST_HEIGHT_ID:].normal_(std=0.1)
    output.normal_(std=0.01)
    half = PLACE_WIDTH // 2
    middles = (torch.arange(NUM_BINS) + 0.5) * (512 / NUM_BINS)
    code = place_code(torch.stack([middles, middles], 1))
    embedding[FIRST_HEIGHT_ID:FIRST_COLUMN_ID, width:] = torch.cat([torch.zeros(NUM_BINS, half), code[:, half:]], 1)
    embedding[FIRST_COLUMN_ID:FIRST_CHAR_ID, width:] = torch.cat([code[:, :half], torch.zeros(NUM_BINS, half)], 1)
