"""The DeepEncoder in plain PyTorch: SAM-style windows, a 16x compressor, CLIP-style blocks, a linear projector.

Module names spell the published weight names, so `state_dict()` is a checkpoint. The arithmetic is the serving
engine's, which a test proves; only what training needs is kept, namely square pages whose side in patches is a
multiple of the attention window.
"""

from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.nano.config import NanoConfig


def _resize_grid(grid: Tensor, side: int) -> Tensor:
    """Resample a position table [1, h, w, c] to [1, side, side, c]; a table of that size is returned as it is."""
    if grid.shape[1] == side:
        return grid
    resized = F.interpolate(grid.permute(0, 3, 1, 2), size=(side, side), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)


def _relative_rows(table: Tensor, side: int) -> Tensor:
    """Return [query, key, channels] from a table of relative positions [2 * native - 1, channels]."""
    if table.shape[0] != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    steps = torch.arange(side)
    return table[steps[:, None] - steps[None, :] + side - 1]


_TRAINED_TOKENS = 2304
"""Attention over more tokens than this is a constant to the gradient: the backward pass would cost most of a step. The
weights that it needs are learnt on smaller views."""


_CHUNK_ROWS = 256
"""Queries whose scores are made at once: few enough for the caches."""


def _in_chunks(q: Tensor) -> bool:
    """Tell whether attention over a page is quicker in chunks: in float32, and with rows that divide."""
    tokens = q.shape[2]
    return q.dtype == torch.float32 and tokens % _CHUNK_ROWS == 0 and 256 < tokens <= _TRAINED_TOKENS


class ChunkedAttention(torch.autograd.Function):
    """Attention with decomposed relative positions, whose scores are never all in memory.

    PyTorch's fused kernel for CPUs takes more than twice as long: it wants the bias as a matrix, or folded into wider
    heads. Queries, keys and values are [b, heads, n, c], biases by a key's row and by its column [b, heads, n, side].
    """

    @staticmethod
    def _weights(q: Tensor, keys: Tensor, rel_h: Tensor, rel_w: Tensor, out: Tensor) -> None:
        """Write the attention of some queries [r, c] over all keys [c, n] into `out` [r, n]."""
        side = rel_h.shape[-1]
        torch.add(rel_h[:, :, None], rel_w[:, None, :], out=out.view(len(q), side, side))
        out.addmm_(q, keys, alpha=q.shape[-1] ** -0.5)
        torch.softmax(out, -1, out=out)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """Return [b, heads, n, c]."""
        b, heads, n, _ = q.shape
        out, weights = torch.empty_like(q), q.new_empty(_CHUNK_ROWS, n)
        for page, head in product(range(b), range(heads)):
            at = page, head
            for start in range(0, n, _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                ChunkedAttention._weights(q[at][rows], k[at].t(), rel_h[at][rows], rel_w[at][rows], weights)
                torch.mm(weights, v[at], out=out[at][rows])
        ctx.save_for_backward(q, k, v, rel_h, rel_w)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients; weights are made again instead of kept."""
        q, k, v, rel_h, rel_w = ctx.saved_tensors
        (grad,) = grads
        (b, heads, n, c), side, scale = q.shape, rel_h.shape[-1], q.shape[-1] ** -0.5
        grad_q, grad_h, grad_w = torch.empty_like(q), torch.empty_like(rel_h), torch.empty_like(rel_w)
        grad_k, grad_v = q.new_zeros(b, heads, c, n), q.new_zeros(b, heads, c, n)
        weights, scores = q.new_empty(_CHUNK_ROWS, n), q.new_empty(_CHUNK_ROWS, n)
        for page, head in product(range(b), range(heads)):
            at = page, head
            for start in range(0, n, _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                ChunkedAttention._weights(q[at][rows], k[at].t(), rel_h[at][rows], rel_w[at][rows], weights)
                grad_v[at].addmm_(grad[at][rows].t(), weights)
                torch.mm(grad[at][rows], v[at].t(), out=scores)
                torch.ops.aten._softmax_backward_data.out(scores, weights, -1, scores.dtype, grad_input=scores)
                grid = scores.view(_CHUNK_ROWS, side, side)
                torch.sum(grid, 2, out=grad_h[at][rows])
                torch.sum(grid, 1, out=grad_w[at][rows])
                torch.mm(scores, k[at], out=grad_q[at][rows])
                grad_k[at].addmm_(q[at][rows].t(), scores)
        return grad_q * scale, grad_k.mT * scale, grad_v.mT, grad_h, grad_w


class SamAttention(nn.Module):
    """Attention over square token grids with decomposed relative positions (one table per axis)."""

    def __init__(self, width: int, heads: int, native_side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * native_side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * native_side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, side, side, width] to the same shape."""
        b, side, _, width = x.shape
        head_size = width // self.heads
        qkv = self.qkv(x).view(b, side * side, 3, self.heads, head_size).permute(2, 0, 3, 1, 4)
        if side * side > _TRAINED_TOKENS:
            qkv = qkv.detach()
        q, k, v = qkv.unbind(0)
        grid = q.reshape(b, self.heads, side, side, head_size)
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, _relative_rows(self.rel_pos_h, side)).flatten(2, 3)
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, _relative_rows(self.rel_pos_w, side)).flatten(2, 3)
        if side * side <= 256 or _in_chunks(q):
            rel_h, rel_w = rel_h.to(q.dtype), rel_w.to(q.dtype)
        if side * side <= 256:
            bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(3)
            scores = torch.matmul(q * head_size**-0.5, k.transpose(-1, -2)) + bias
            out = torch.matmul(scores.softmax(-1).to(v.dtype), v)
        elif _in_chunks(q):
            out = ChunkedAttention.apply(q, k, v, rel_h, rel_w)
        elif side * side > _TRAINED_TOKENS:
            with torch.no_grad():
                out = self._attend_page_by_page(q, k, v, rel_h, rel_w)
        else:
            out = self._attend_without_bias_matrix(q, k, v, rel_h, rel_w)
        return self.proj(out.transpose(1, 2).reshape(b, side, side, width))

    @staticmethod
    def _attend_page_by_page(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """Attend with a matrix of biases, page by page: twice as quick as without one, where no gradient flows."""
        pages = []
        for query, key, value, by_row, by_column in zip(q, k, v, rel_h.to(q.dtype), rel_w.to(q.dtype), strict=True):
            bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(2)
            pages.append(F.scaled_dot_product_attention(query[None], key[None], value[None], bias[None]))
        return torch.cat(pages)

    @staticmethod
    def _attend_without_bias_matrix(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """Attend with the bias folded into the inner product, so that a fused kernel can run.

        The bias of a pair is `rel_h[key row] + rel_w[key column]`: a product of the query's two rows of biases with
        one-hot vectors of the key's row and column. Values are padded because the kernel wants equal head sizes.
        """
        side, head_size = rel_h.shape[-1], q.shape[-1]
        eye = torch.eye(side, dtype=k.dtype)
        where = torch.cat([eye.repeat_interleave(side, 0), eye.repeat(side, 1)], -1)
        queries = torch.cat([q * head_size**-0.5, rel_h, rel_w], -1)
        keys = torch.cat([k, where.expand(*k.shape[:2], -1, -1)], -1)
        padded = F.pad(v, (0, 2 * side))
        return F.scaled_dot_product_attention(queries.to(v.dtype), keys, padded, scale=1.0)[..., :head_size]


class SamMlp(nn.Module):
    """The block's two linear layers with an exact GELU between them."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, ratio * width)
        self.lin2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return self.lin2(F.gelu(self.lin1(x)))


class SamBlock(nn.Module):
    """Pre-norm transformer block over windows of `window` patches a side, or over the whole page when it is 0."""

    def __init__(self, sizes: NanoConfig, window: int) -> None:
        super().__init__()
        width = sizes.sam_width
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SamAttention(width, sizes.sam_heads, window or sizes.sam_side)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SamMlp(width, sizes.sam_mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, side, side, width] to the same shape."""
        x = x + (self._attend_windows(self.norm1(x)) if self.window else self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    def _attend_windows(self, x: Tensor) -> Tensor:
        b, side, _, width = x.shape
        n, w = side // self.window, self.window
        windows = x.view(b, n, w, n, w, width).transpose(2, 3).reshape(-1, w, w, width)
        return self.attn(windows).view(b, n, n, w, w, width).transpose(2, 3).reshape(b, side, side, width)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of [b, c, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, c, h, w] to the same shape."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return normed.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Non-overlapping square patches to vectors."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map [b, 3, S, S], or [b, 1, S, S] of grey, to [b, side, side, width].

        A matrix product is quicker than the convolution it equals, and one channel quicker than three equal ones.
        """
        b, channels, size, _ = pixels.shape
        patch = self.proj.kernel_size[0]
        side = size // patch
        rows = pixels.view(b, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(b, side, side, -1)
        weight = self.proj.weight if channels == 3 else self.proj.weight.sum(1, keepdim=True)
        return F.linear(rows, weight.flatten(1), self.proj.bias)


class TrainedSamEncoder(nn.Module):
    """SAM-style encoder with the 16x compressor behind it."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(sizes.sam_width, sizes.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.sam_side, sizes.sam_side, sizes.sam_width))
        self.blocks = nn.ModuleList(
            SamBlock(sizes, 0 if layer in sizes.sam_global_layers else sizes.sam_window)
            for layer in range(sizes.sam_layers)
        )
        neck, (first, second) = sizes.neck_channels, sizes.downsample_channels
        self.neck = nn.Sequential(
            nn.Conv2d(sizes.sam_width, neck, 1, bias=False),
            ChannelNorm(neck),
            nn.Conv2d(neck, neck, 3, padding=1, bias=False),
            ChannelNorm(neck),
        )
        self.net_2 = nn.Conv2d(neck, first, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map [b, 3 or 1, S, S] to patch features [b, side, side, width] and compressed ones [b, c, side/4, side/4]."""
        x = self.patch_embed(pixels)
        x = x + _resize_grid(self.pos_embed, x.shape[1])
        for block in self.blocks:
            x = block(x)
        return x, self.net_3(self.net_2(self.neck(x.permute(0, 3, 1, 2))))


class ClipAttention(nn.Module):
    """Plain multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, n, width] to the same shape."""
        b, n, width = x.shape
        qkv = self.qkv_proj(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out_proj(out.transpose(1, 2).reshape(b, n, width))


class ClipMlp(nn.Module):
    """The block's two linear layers with CLIP's quick GELU between them."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        inner = self.fc1(x)
        return self.fc2(inner * torch.sigmoid(1.702 * inner))


class ClipBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(sizes.clip_width, eps=1e-5)
        self.self_attn = ClipAttention(sizes.clip_width, sizes.clip_heads)
        self.layer_norm2 = nn.LayerNorm(sizes.clip_width, eps=1e-5)
        self.mlp = ClipMlp(sizes.clip_width, sizes.clip_mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, n, width] to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    """The class token and the positions, put around patches that were embedded elsewhere."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        width, patch = sizes.clip_width, sizes.clip_patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False).requires_grad_(False)  # never run
        self.position_embedding = nn.Embedding(sizes.num_clip_positions, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Map [b, c, side, side] to [b, 1 + side * side, c]."""
        b, width, side, _ = patches.shape
        table = self.position_embedding.weight
        native = round((table.shape[0] - 1) ** 0.5)
        grid = _resize_grid(table[1:].view(1, native, native, width), side).reshape(side * side, width)
        tokens = torch.cat([self.class_embedding.expand(b, 1, -1), patches.flatten(2).transpose(1, 2)], 1)
        return tokens + torch.cat([table[:1], grid])


class ClipEncoder(nn.Module):
    """CLIP-style encoder over compressed SAM features."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.clip_width, eps=1e-5)  # the published name has the typo
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(ClipBlock(sizes) for _ in range(sizes.clip_layers))

    def forward(self, patches: Tensor) -> Tensor:
        """Map [b, c, side, side] to [b, side * side, c], the class token dropped."""
        x = self.pre_layrnorm(self.embeddings(patches))
        for layer in self.transformer.layers:
            x = layer(x)
        return x[:, 1:]


class Projector(nn.Module):
    """One linear layer from encoder to decoder width; `layers` is its published name."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.layers = nn.Linear(sizes.clip_width + sizes.downsample_channels[1], sizes.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., clip + sam channels] to [..., hidden]."""
        return self.layers(x)


class EncodedPages(NamedTuple):
    """What the encoder makes of a batch of pages."""

    patches: Tensor
    """SAM features of every patch, [b, side, side, sam_width]."""
    cells: Tensor
    """Projected vision tokens in reading order, [b, grid_side ** 2, hidden]."""
