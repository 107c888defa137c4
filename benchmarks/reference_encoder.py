"""DeepEncoder in plain PyTorch, straight from the paper and the published names: what the served model is held against.

It shares no code with vLLM or the plugin, reads the weights from a checkpoint's file by their published names, and
computes in float64 by default, one head at a time, so that large views fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from serving.nano.config import NanoConfig

_CPU = torch.device("cpu")
Weights = Mapping[str, Tensor]


class ReferenceEncoder:
    """Computes a page's features from its views."""

    def __init__(
        self,
        weights_file: Path,
        sizes: NanoConfig,
        dtype: torch.dtype = torch.float64,
        device: torch.device = _CPU,
    ) -> None:
        kinds = ("model.sam_model.", "model.vision_model.", "model.projector.", "model.image_newline", "model.view_")
        weights = load_file(weights_file)
        self._weights = {name: value.to(device, dtype) for name, value in weights.items() if name.startswith(kinds)}
        self._sizes, self._dtype = sizes, dtype

    def encode_page(self, page: Tensor, tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return a page's features in the order of its placeholders, (num_tokens, hidden).

        Args:
            page: the global view, uint8 (3, b, b).
            tiles: uint8 (num_tiles, 3, s, s), row by row; none for a page that is not cut.
            grid: columns and rows of the tiles.
        """
        newline, separator = self._weights["model.image_newline"], self._weights["model.view_seperator"]
        parts = []
        columns, rows = grid
        if columns * rows > 1:
            features = [self.encode_view(tile) for tile in tiles]
            side = math.isqrt(len(features[0]))
            squares = [view.view(side, side, -1) for view in features]
            lines = [torch.cat(squares[row * columns : (row + 1) * columns], 1) for row in range(rows)]
            parts += [torch.cat((line, newline[None])) for line in torch.cat(lines)]
        view = self.encode_view(page)
        side = math.isqrt(len(view))
        parts += [torch.cat((line, newline[None])) for line in view.view(side, side, -1)]
        return torch.cat([*parts, separator[None]])

    def encode_view(self, pixels: Tensor) -> Tensor:
        """Return the features of one view, uint8 (3, s, s) -> ((s/64)^2, hidden)."""
        floats = (pixels.to(self._dtype) / 255 - 0.5) / 0.5
        compressed = self._sam(floats[None])
        places = compressed.flatten(2)[0].T
        features = torch.cat((self._clip(places), places), 1)
        return F.linear(features, *self._linear("model.projector.layers"))

    def _linear(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._linear(name), eps)

    def _sam(self, floats: Tensor) -> Tensor:
        w, prefix = self._weights, "model.sam_model"
        x = F.conv2d(floats, *self._linear(f"{prefix}.patch_embed.proj"), stride=16).permute(0, 2, 3, 1)
        table = w[f"{prefix}.pos_embed"]
        if table.shape[1] != x.shape[1]:
            table = _resize(table[0], x.shape[1])[None]
        x = x + table
        for layer in range(self._sizes.sam_layers):
            x = self._sam_block(x, f"{prefix}.blocks.{layer}", layer in self._sizes.sam_global_layers)
        x = F.conv2d(x.permute(0, 3, 1, 2), w[f"{prefix}.neck.0.weight"])
        x = self._norm(x.permute(0, 2, 3, 1), f"{prefix}.neck.1", 1e-6).permute(0, 3, 1, 2)
        x = F.conv2d(x, w[f"{prefix}.neck.2.weight"], padding=1)
        x = self._norm(x.permute(0, 2, 3, 1), f"{prefix}.neck.3", 1e-6).permute(0, 3, 1, 2)
        for name in ("net_2", "net_3"):
            x = F.conv2d(x, w[f"{prefix}.{name}.weight"], stride=2, padding=1)
        return x

    def _sam_block(self, x: Tensor, name: str, is_global: bool) -> Tensor:
        normed = self._norm(x, f"{name}.norm1", 1e-6)
        window, side = self._sizes.sam_window, x.shape[1]
        if is_global:
            attended = self._attend(normed, name)
        else:
            padding = -side % window
            padded = F.pad(normed, (0, 0, 0, padding, 0, padding))
            attended = torch.zeros_like(padded)
            for top in range(0, side, window):
                for left in range(0, side, window):
                    part = (slice(None), slice(top, top + window), slice(left, left + window))
                    attended[part] = self._attend(padded[part], name)
            attended = attended[:, :side, :side]
        x = x + attended
        inner = F.gelu(F.linear(self._norm(x, f"{name}.norm2", 1e-6), *self._linear(f"{name}.mlp.lin1")))
        return x + F.linear(inner, *self._linear(f"{name}.mlp.lin2"))

    def _attend(self, x: Tensor, name: str) -> Tensor:
        """Attend among all places of a square, with the bias of their distances in rows and in columns."""
        _, side, _, width = x.shape
        heads = self._sizes.sam_heads
        parts = F.linear(x, *self._linear(f"{name}.attn.qkv")).view(side * side, 3, heads, width // heads)
        down, across = (self._distances(f"{name}.attn.rel_pos_{axis}", side) for axis in "hw")
        joined = []
        for head in range(heads):
            query, key, value = parts[:, :, head].unbind(1)
            scores = query @ key.T / math.sqrt(width // heads)
            square = query.view(side, side, -1)
            by_row = torch.einsum("hwc,hkc->hwk", square, down)
            by_column = torch.einsum("hwc,wkc->hwk", square, across)
            bias = by_row[..., :, None] + by_column[..., None, :]
            joined.append(torch.softmax(scores + bias.reshape(scores.shape), -1) @ value)
        return F.linear(torch.cat(joined, 1).view(x.shape), *self._linear(f"{name}.attn.proj"))

    def _distances(self, name: str, side: int) -> Tensor:
        """Return the vector for each pair of places along one side, (side, side, width of a head)."""
        table = self._weights[name]
        if len(table) != 2 * side - 1:
            table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
        places = torch.arange(side, device=table.device)
        return table[places[:, None] - places[None] + side - 1]

    def _clip(self, places: Tensor) -> Tensor:
        prefix, heads = "model.vision_model", self._sizes.clip_heads
        table = self._weights[f"{prefix}.embeddings.position_embedding.weight"]
        if len(table) != len(places) + 1:
            old, new = math.isqrt(len(table) - 1), math.isqrt(len(places))
            grid = _resize(table[1:].view(old, old, -1), new)
            table = torch.cat((table[:1], grid.reshape(new * new, -1)))
        x = torch.cat((self._weights[f"{prefix}.embeddings.class_embedding"][None], places)) + table
        x = self._norm(x, f"{prefix}.pre_layrnorm", 1e-5)
        for layer in range(self._sizes.clip_layers):
            name = f"{prefix}.transformer.layers.{layer}"
            qkv = F.linear(self._norm(x, f"{name}.layer_norm1", 1e-5), *self._linear(f"{name}.self_attn.qkv_proj"))
            query, key, value = qkv.view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
            scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
            joined = (torch.softmax(scores, -1) @ value).transpose(0, 1).reshape(len(x), -1)
            x = x + F.linear(joined, *self._linear(f"{name}.self_attn.out_proj"))
            inner = F.linear(self._norm(x, f"{name}.layer_norm2", 1e-5), *self._linear(f"{name}.mlp.fc1"))
            x = x + F.linear(inner * torch.sigmoid(1.702 * inner), *self._linear(f"{name}.mlp.fc2"))
        return x[1:]


def _resize(table: Tensor, side: int) -> Tensor:
    """Resample a square table of positions, (old, old, width) -> (side, side, width)."""
    picture = F.interpolate(table.permute(2, 0, 1)[None], size=(side, side), mode="bicubic", antialias=True)
    return picture[0].permute(1, 2, 0)


def relative_error(found: Tensor, wanted: Tensor | Sequence[float]) -> float:
    """Return the length of the difference as a part of the length of what was wanted."""
    exact = torch.as_tensor(wanted).double()
    return float((found.double().to(exact.device) - exact).norm() / exact.norm())
