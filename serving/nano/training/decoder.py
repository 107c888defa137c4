"""The DeepSeek-V2 decoder with plain multi-head attention and a mixture of experts, in plain PyTorch.

Module names spell the published weight names.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.nano.config import NanoConfig

KVCache = list[tuple[Tensor, Tensor]]


class RmsNorm(nn.Module):
    """Root-mean-square norm without a bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape, in float32."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotary_tables(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [length, head_size / 2] each, float32."""
    rates = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of [b, heads, n, head_size] by the angles of their positions."""
    first, second = x.float().chunk(2, -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, -1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions (halves, not pairs)."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.heads = sizes.num_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attend from [b, n, hidden]; `past` holds earlier keys and values, and then n must be 1.

        Returns the output [b, n, hidden] and queries, keys and values [b, heads, n or all, head_size].
        """
        b, n, hidden = x.shape
        q, k, v = (
            proj(x).view(b, n, self.heads, hidden // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, hidden)), q, k, v


class Mlp(nn.Module):
    """Gated SiLU layer."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Map [..., hidden] to the same shape; there are no router scores."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


_EXPERT_ROWS = 64


def _run_padded(expert: Mlp, rows: Tensor) -> Tensor:
    """Run an expert over its tokens [r, hidden], padded in bfloat16, where oneDNN builds a kernel for every shape."""
    if not torch.is_autocast_enabled("cpu"):
        return expert(rows)[0]
    return expert(F.pad(rows, (0, 0, 0, -len(rows) % _EXPERT_ROWS)))[0][: len(rows)]


class MixtureOfExperts(nn.Module):
    """Top-k routed experts, weighted by the router's softmax without renormalising, plus shared experts."""

    def __init__(self, sizes: NanoConfig) -> None:
        super().__init__()
        self.top_k = sizes.num_experts_per_token
        self.gate = nn.Linear(sizes.hidden_size, sizes.num_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(sizes.hidden_size, sizes.expert_size) for _ in range(sizes.num_experts))
        self.shared_experts = Mlp(sizes.hidden_size, sizes.expert_size * sizes.num_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [..., hidden] to the same shape; the second result is the router's logits [..., experts]."""
        logits = F.linear(x, self.gate.weight).float()
        gates, chosen = logits.softmax(-1).topk(self.top_k, -1)
        tokens = x.flatten(0, -2)
        # Token and expert of every pair, sorted by expert, so that each expert runs once over its own tokens.
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.top_k
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = tokens[rows].split(counts)
        routed = torch.cat([_run_padded(expert, part) for expert, part in zip(self.experts, parts, strict=True)])
        weighted = routed * gates.flatten()[order, None].to(routed.dtype)
        out = self.shared_experts(tokens)[0].index_add(0, rows, weighted)
        return out.view_as(x), logits


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then a dense layer or the experts."""

    def __init__(self, sizes: NanoConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RmsNorm(sizes.hidden_size, sizes.rms_norm_eps)
        is_dense = index < sizes.num_dense_layers
        self.mlp = Mlp(sizes.hidden_size, sizes.dense_size) if is_dense else MixtureOfExperts(sizes)


class DecoderTrace(NamedTuple):
    """What a decoder pass leaves for the training losses."""

    hidden: Tensor
    """Normed last hidden states, [b, n, hidden]."""
    residuals: list[Tensor]
    """The residual stream after every layer, [b, n, hidden] each."""
    queries: list[Tensor]
    keys: list[Tensor]
    """Rotated queries and keys of every layer, [b, heads, n, head_size] each."""
    router_logits: list[Tensor]
    """Router logits of the expert layers, [b, n, experts] each."""


def run_decoder(
    layers: nn.ModuleList,
    norm: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    rewrite: Callable[[int, Tensor], Tensor] | None = None,
) -> DecoderTrace:
    """Run [b, n, hidden] through the layers, with all positions present.

    What `rewrite` makes of a layer's number and the residual stream behind it goes on in its place.
    """
    trace = DecoderTrace(x, [], [], [], [])
    for index, layer in enumerate(layers):
        attended, q, k, _ = layer.self_attn(layer.input_layernorm(x), rotary)
        x = x + attended
        out, logits = layer.mlp(layer.post_attention_layernorm(x))
        x = x + out
        trace.residuals.append(x)
        if rewrite is not None:
            x = rewrite(index, x)
        trace.queries.append(q)
        trace.keys.append(k)
        if logits is not None:
            trace.router_logits.append(logits)
    return trace._replace(hidden=norm(x))


def run_cached(
    layers: nn.ModuleList, norm: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache
) -> Tensor:
    """Run the next tokens [b, n, hidden], extending `cache` in place; n may exceed 1 only on an empty cache."""
    is_first = not cache
    for index, layer in enumerate(layers):
        past = None if is_first else cache[index]
        attended, _, k, v = layer.self_attn(layer.input_layernorm(x), rotary, past)
        if is_first:
            cache.append((k, v))
        else:
            cache[index] = (k, v)
        x = x + attended
        x = x + layer.mlp(layer.post_attention_layernorm(x))[0]
    return norm(x)
