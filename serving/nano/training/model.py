"""The nano model in plain PyTorch, for training and for measuring without a serving engine."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from serving.nano.config import NANO, NanoConfig
from serving.nano.tokenizer import BOS_ID, EOS_ID, PAD_ID
from serving.nano.training.decoder import (
    DecoderLayer,
    DecoderTrace,
    KVCache,
    RmsNorm,
    rotary_tables,
    run_cached,
    run_decoder,
)
from serving.nano.training.encoder import ClipEncoder, EncodedPages, Projector, TrainedSamEncoder


class NanoOcr(nn.Module):
    """DeepSeek-OCR at nano sizes. `state_dict()` has the published weight names.

    Pages are uint8 [b, S, S] (grey) or [b, 3, S, S]; texts are token ids.
    """

    def __init__(self, sizes: NanoConfig = NANO) -> None:
        super().__init__()
        self.sizes = sizes
        trunk = nn.Module()
        trunk.sam_model = TrainedSamEncoder(sizes)
        trunk.vision_model = ClipEncoder(sizes)
        trunk.projector = Projector(sizes)
        trunk.image_newline = nn.Parameter(torch.zeros(sizes.hidden_size))
        trunk.view_seperator = nn.Parameter(torch.zeros(sizes.hidden_size))
        trunk.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        trunk.layers = nn.ModuleList(DecoderLayer(sizes, index) for index in range(sizes.num_layers))
        trunk.norm = RmsNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.model = trunk
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def encode(self, pages: Tensor) -> EncodedPages:
        """Encode uint8 pages of one size."""
        return self.project(*self.model.sam_model(self.pixels_of(pages)))

    @staticmethod
    def pixels_of(pages: Tensor) -> Tensor:
        """Return what the encoder takes of uint8 pages: [b, 1, S, S] of grey ones, [b, 3, S, S] of coloured ones."""
        return (pages[:, None] if pages.dim() == 3 else pages).float() / 127.5 - 1.0

    def project(self, patches: Tensor, compressed: Tensor) -> EncodedPages:
        """Return what the second encoder and the projector make of the first one's results."""
        context = self.model.vision_model(compressed)
        features = torch.cat([context, compressed.flatten(2).transpose(1, 2)], -1)
        return EncodedPages(patches, self.model.projector(features))

    def embed_prompt(self, cells: Tensor, prompt: Sequence[int]) -> Tensor:
        """Return the embedded prompt [b, n, hidden]: start marker, the image's tokens, then `prompt`."""
        b, count, hidden = cells.shape
        side = round(count**0.5)
        newline = self.model.image_newline.expand(b, side, 1, hidden)
        rows = torch.cat([cells.view(b, side, side, hidden), newline], 2).flatten(1, 2)
        separator = self.model.view_seperator.expand(b, 1, hidden)
        start, rest = self.embed_ids([BOS_ID]), self.embed_ids(prompt)
        return torch.cat([start.expand(b, -1, -1), rows, separator, rest.expand(b, -1, -1)], 1)

    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """Return [1, n, hidden]."""
        return self.model.embed_tokens(torch.tensor([list(ids)], dtype=torch.long))

    def decode(self, embeds: Tensor, rewrite: Callable[[int, Tensor], Tensor] | None = None) -> DecoderTrace:
        """Run the decoder over [b, n, hidden]; `rewrite` is as `run_decoder` takes it."""
        return run_decoder(self.model.layers, self.model.norm, embeds, self._rotary(0, embeds.shape[1]), rewrite)

    def _rotary(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(stop, self.sizes.hidden_size // self.sizes.num_heads, self.sizes.rope_theta)
        return cos[start:], sin[start:]

    @torch.no_grad()
    def generate(self, pages: Tensor, prompt: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Read the pages greedily; each result ends before its end marker, or after `max_tokens`."""
        x = self.embed_prompt(self.encode(pages).cells, prompt)
        cache: KVCache = []
        outputs: list[list[int]] = [[] for _ in range(len(pages))]
        is_done = torch.zeros(len(pages), dtype=torch.bool)
        start = 0
        for _ in range(max_tokens):
            rotary = self._rotary(start, start + x.shape[1])
            start += x.shape[1]
            hidden = run_cached(self.model.layers, self.model.norm, x, rotary, cache)[:, -1]
            ids = self.lm_head(hidden).argmax(-1).masked_fill(is_done, PAD_ID)
            is_done |= ids == EOS_ID
            if bool(is_done.all()):
                break
            for output, token, done in zip(outputs, ids.tolist(), is_done.tolist(), strict=True):
                if not done:
                    output.append(token)
            x = self.model.embed_tokens(ids)[:, None]
        return outputs


def load_model(checkpoint: Path, sizes: NanoConfig = NANO) -> NanoOcr:
    """Load a checkpoint directory or a weights file into a float32 model."""
    from safetensors.torch import load_file

    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    model = NanoOcr(sizes)
    model.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
    return model.eval()
