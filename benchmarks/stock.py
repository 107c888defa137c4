"""vLLM's own DeepSeek-OCR, importable beside a CPU torch, where torchvision cannot be, and at any sizes.

For comparisons only: the parity tests and the benchmarks run it beside ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from serving.nano.config import NanoConfig

SIZES_FILE = "benchmark_sizes.json"
"""Beside a checkpoint's other files: the `NanoConfig` that it was made with."""
NAME = "vLLM 0.32"


def import_stock(module: str = "vllm.model_executor.models.deepseek_ocr") -> Any:
    """A module of vLLM's that imports torchvision, which need not be there."""
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(module)
    import transformers  # noqa: F401 - looks for a real torchvision when it is imported

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    vars(transforms).update(ToTensor=lambda: _to_tensor, Normalize=_normalize, Compose=_compose)
    vars(package)["transforms"] = transforms
    names = {"torchvision": package, "torchvision.transforms": transforms}
    sys.modules.update(names)
    try:
        # vLLM looks this one up by name while it serves, when the stand-in is gone again.
        importlib.import_module("vllm.transformers_utils.processors.deepseek_vl2")
        return importlib.import_module(module)
    finally:
        for name in names:
            del sys.modules[name]


def _to_tensor(image: Any) -> torch.Tensor:
    """What torchvision's ToTensor does to an RGB image, in as many passes: (h, w, 3) uint8 -> (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _normalize(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(pixels: torch.Tensor) -> torch.Tensor:
        shape = (3, 1, 1)
        return pixels.clone().sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))

    return run


def _compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return run


def patch_mode(stock: types.ModuleType, base_size: int, image_size: int) -> None:
    """Put a resolution mode where vLLM has gundam in its code. A page that fits into `image_size` is not cut."""
    vars(stock).update(BASE_SIZE=base_size, IMAGE_SIZE=image_size)


def patch_sizes(stock: types.ModuleType, sizes: NanoConfig) -> None:
    """Put these sizes where vLLM has the published ones in its code."""
    from transformers import CLIPVisionConfig
    from vllm.model_executor.models.deepencoder import ImageEncoderViT

    def build_sam() -> nn.Module:
        sam = ImageEncoderViT(
            img_size=sizes.image_size,
            embed_dim=sizes.sam_width,
            depth=sizes.sam_layers,
            num_heads=sizes.sam_heads,
            out_chans=sizes.neck_channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.sam_window,
            global_attn_indexes=sizes.sam_global_layers,
        )
        first, second = sizes.downsample_channels
        sam.net_2 = nn.Conv2d(sizes.neck_channels, first, 3, stride=2, padding=1, bias=False)
        sam.net_3 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        return sam

    clip = {
        "hidden_size": sizes.clip_width,
        "intermediate_size": 4 * sizes.clip_width,
        "num_attention_heads": sizes.clip_heads,
        "num_hidden_layers": sizes.clip_layers,
        "image_size": sizes.clip_patch_size * sizes.grid_side,
        "patch_size": sizes.clip_patch_size,
    }
    vars(stock).update(
        build_sam_vit_b=build_sam, CLIPVisionConfig=lambda **given: CLIPVisionConfig(**{**given, **clip})
    )
