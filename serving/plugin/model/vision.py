"""DeepEncoder: SAM-style encoder -> 16x convolutional compressor -> CLIP-style encoder -> linear projector.

All sizes come from the checkpoint's `vision_config`; the published values give the published sizes. The layers are
vLLM's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig
from vllm.model_executor.layers.conv import Conv2dLayer

from serving.plugin.interfaces.vllm_internals import encoder_layers
from serving.plugin.model.sam_cpu import EncoderTables, build_tables, run_encoder

ImageEncoderViT, DeepCLIPVisionTransformer, MlpProjector = encoder_layers()

_CPU_PATCHES = 4096
_DEVICE_BYTES = 2**30
_MAX_VIEWS = 16
"""Bounds on the views that SAM encodes together: larger batches do not fit into a CPU's caches; on a device their
intermediates need the memory, and beyond 16 views it computes no faster."""

_HALF = (0.5, 0.5, 0.5)
Channels = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """The sizes of both encoders. Those that the published configuration lacks (window, neck) default to vLLM's."""

    image_size: int
    """Pixels per side for which SAM's position table was trained."""
    sam_width: int
    sam_layers: int
    sam_heads: int
    sam_global_layers: tuple[int, ...]
    downsample_channels: tuple[int, int]
    clip_width: int
    clip_layers: int
    clip_heads: int
    clip_image_size: int
    clip_patch_size: int
    sam_window: int
    sam_neck_channels: int
    sam_patch_size: int = 16

    @classmethod
    def from_config(cls, vision_config: Any) -> VisionSizes:
        """Read a `vision_config` with the published checkpoint's nesting (`width: {sam_vit_b, clip-l-14-224}`).

        Raises:
            ValueError: the configuration lacks a size, or the towers do not fit together.
        """
        towers = vision_config.width
        try:
            sam, clip = towers["sam_vit_b"], towers["clip-l-14-224"]
            sizes = cls(
                image_size=vision_config.image_size,
                sam_width=sam["width"],
                sam_layers=sam["layers"],
                sam_heads=sam["heads"],
                sam_global_layers=tuple(sam["global_attn_indexes"]),
                downsample_channels=tuple(sam["downsample_channels"]),
                clip_width=clip["width"],
                clip_layers=clip["layers"],
                clip_heads=clip["heads"],
                clip_image_size=clip["image_size"],
                clip_patch_size=clip["patch_size"],
                sam_window=sam.get("window_size", 14),
                sam_neck_channels=sam.get("neck_channels", 256),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"vision_config: `width` lacks {error} for the towers sam_vit_b and clip-l-14-224"
            ) from error
        if sizes.downsample_channels[-1] != sizes.clip_width:
            raise ValueError(
                f"vision_config: CLIP's width {sizes.clip_width} must equal SAM's last, {sizes.downsample_channels[-1]}"
            )
        return sizes


class SamEncoder(ImageEncoderViT):  # type: ignore[misc, valid-type]  # Any to mypy
    """vLLM's SAM-style encoder with a compressor of configured width: uint8 (n, 3, s, s) -> (n, c, s/64, s/64)."""

    def __init__(self, sizes: VisionSizes, mean: Channels = _HALF, std: Channels = _HALF) -> None:
        """Create the encoder.

        Args:
            sizes: the sizes of its layers.
            mean: mean of each channel, as a fraction of 255, with which pixels are normalised.
            std: standard deviation of each channel, likewise.
        """
        super().__init__(
            img_size=sizes.image_size,
            patch_size=sizes.sam_patch_size,
            embed_dim=sizes.sam_width,
            depth=sizes.sam_layers,
            num_heads=sizes.sam_heads,
            mlp_ratio=4,
            out_chans=sizes.sam_neck_channels,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.sam_window,
            global_attn_indexes=sizes.sam_global_layers,
        )
        first, second = sizes.downsample_channels
        halve = partial(Conv2dLayer, kernel_size=3, stride=2, padding=1, bias=False)
        self.net_2 = halve(sizes.sam_neck_channels, first)
        self.net_3 = halve(first, second)
        self._mean, self._std = mean, std
        self._positions: dict[tuple[int, int, int], torch.Tensor] = {}
        self._tables: tuple[tuple[tuple[int, int], ...], dict[int, EncoderTables]] = (), {}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.is_ours(pixels.device):
            return run_encoder(self, pixels, self._tables_for(pixels.shape[-1]))
        return super().forward(normalise(pixels, self._mean, self._std, self.patch_embed.proj.weight.dtype))

    def is_ours(self, device: torch.device) -> bool:
        """Whether `sam_cpu` computes on this device instead of vLLM's own layers."""
        return device.type == "cpu" and self.patch_embed.proj.weight.dtype == torch.float32

    def _tables_for(self, side: int) -> EncoderTables:
        """Return the tables for a size of view, which are built once per size instead of for every batch.

        Addresses and versions show whether weights were loaded again or changed in place.
        """
        distances = ((block.attn.rel_pos_h, block.attn.rel_pos_w) for block in self.blocks)
        weights = (self.pos_embed, *self.patch_embed.parameters(), *itertools.chain.from_iterable(distances))
        now = tuple((weight.data_ptr(), weight._version) for weight in weights)
        known, tables = self._tables  # read together, because several threads may run this
        if known != now:
            tables = {}
            self._tables = now, tables
        if side not in tables:
            tables[side] = build_tables(self, side, self._mean, self._std)
        return tables[side]

    def get_abs_pos(self, abs_pos: torch.Tensor, tgt_size: int) -> torch.Tensor:
        """Return the position table at another size, which is resampled once per size instead of for every batch.

        The key changes when the weights were loaded again or changed in place.
        """
        key = (tgt_size, abs_pos.data_ptr(), abs_pos._version)
        positions = self._positions.get(key)
        if positions is None:
            positions = super().get_abs_pos(abs_pos, tgt_size)
            self._positions = {old: value for old, value in self._positions.items() if old[1:] == key[1:]}
            self._positions[key] = positions
        return positions


def build_clip(sizes: VisionSizes, quant_config: Any, prefix: str) -> nn.Module:
    """Build vLLM's CLIP-style encoder, which takes SAM's compressed features instead of patches of its own."""
    config = CLIPVisionConfig(
        hidden_size=sizes.clip_width,
        intermediate_size=4 * sizes.clip_width,
        num_attention_heads=sizes.clip_heads,
        num_hidden_layers=sizes.clip_layers,
        image_size=sizes.clip_image_size,
        patch_size=sizes.clip_patch_size,
        projection_dim=512,
        layer_norm_eps=1e-5,
    )
    return DeepCLIPVisionTransformer(config=config, quant_config=quant_config, prefix=prefix)


def project_views(clip: nn.Module, projector: nn.Module, compressed: torch.Tensor) -> torch.Tensor:
    """Return the features of square views of one size.

    Args:
        compressed: SAM's output for them, (n, c, s/64, s/64).

    Returns:
        (n, (s/64)^2, hidden).
    """
    semantic = clip(compressed, compressed)  # of the pixels, for which the first stands, it reads only the number
    features = torch.cat((semantic[:, 1:], compressed.flatten(2).permute(0, 2, 1)), dim=-1)
    return projector(features)


def views_per_batch(sizes: VisionSizes, view_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many views with this many pixels per side SAM may encode together within the bounds."""
    num_patches = (view_size // sizes.sam_patch_size) ** 2
    if device.type == "cpu":
        return max(1, _CPU_PATCHES // num_patches)
    view_bytes = num_patches * _patch_values(sizes, num_patches, device) * dtype.itemsize
    return max(1, min(_MAX_VIEWS, _DEVICE_BYTES // view_bytes))


def _patch_values(sizes: VisionSizes, num_patches: int, device: torch.device) -> int:
    """Return the values for each patch of a view that vLLM's layers hold at once.

    These are the features and their norm, queries, keys and values or both sides of the MLP's activation, and for each
    head a bias for every other patch that attention sees, before and after it is summed. In global attention vLLM's
    kernel for CUDA and ROCm adds that bias itself, from one value per row and column of the view.
    """
    layer = (2 + 2 * 4 + 3) * sizes.sam_width
    side = math.isqrt(num_patches)
    seen = 2 * side if device.type == "cuda" else num_patches
    return layer + 2 * sizes.sam_heads * max(seen, sizes.sam_window**2)


def normalise(pixels: torch.Tensor, mean: Channels, std: Channels, dtype: torch.dtype) -> torch.Tensor:
    """Convert uint8 (n, 3, h, w) to the encoder's floats, via float32, so that a narrow dtype rounds only once."""
    scale, offset = _scale_and_offset(mean, std, pixels.device)
    # (x / 255 - mean) / std in two passes over the pixels instead of three.
    return pixels.to(torch.float32).mul_(scale).add_(offset).to(dtype)


@lru_cache(maxsize=8)
def _scale_and_offset(mean: Channels, std: Channels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors and summands of `normalise`, which are sent to the device once: for each batch the host would
    wait until the device has them."""
    shape = (1, 3, 1, 1)
    scale = torch.tensor([1 / (255 * value) for value in std], dtype=torch.float32, device=device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
    return scale.view(shape), offset.view(shape)
