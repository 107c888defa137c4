"""vLLM's own DeepSeek-OCR, importable without torchvision and with its hard-coded sizes patched down. Tests only."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from serving.demo.config import NANO


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """What torchvision's ToTensor does to an RGB image: (h, w, 3) uint8 -> (3, h, w) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _normalize(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    shape = (3, 1, 1)
    return lambda x: (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def _compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return run


@contextlib.contextmanager
def _torchvision_stand_in() -> Iterator[None]:
    """The three transforms that vLLM's processor uses, there for as long as its modules are imported."""
    import transformers  # noqa: F401 - looks for a real torchvision when it is imported

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    transforms.ToTensor = lambda: _to_tensor  # type: ignore[attr-defined]
    transforms.Normalize = _normalize  # type: ignore[attr-defined]
    transforms.Compose = _compose  # type: ignore[attr-defined]
    package.transforms = transforms  # type: ignore[attr-defined]
    names = {"torchvision": package, "torchvision.transforms": transforms}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_stock() -> types.ModuleType:
    """The module `vllm.model_executor.models.deepseek_ocr`."""
    with _torchvision_stand_in():
        from vllm.model_executor.models import deepseek_ocr
        from vllm.transformers_utils.processors import deepseek_vl2  # noqa: F401 - looked up later, by name

        return deepseek_ocr


def patch_sizes(stock: types.ModuleType) -> None:
    """Put the nano sizes where vLLM has the published ones in its code."""
    from transformers import CLIPVisionConfig
    from vllm.model_executor.models.deepencoder import ImageEncoderViT

    def build_sam() -> nn.Module:
        sam = ImageEncoderViT(
            img_size=NANO.image_size,
            embed_dim=NANO.sam_width,
            depth=NANO.sam_layers,
            num_heads=NANO.sam_heads,
            out_chans=NANO.neck_channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=NANO.sam_window,
            global_attn_indexes=NANO.sam_global_layers,
        )
        first, second = NANO.downsample_channels
        sam.net_2 = nn.Conv2d(NANO.neck_channels, first, 3, stride=2, padding=1, bias=False)
        sam.net_3 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        return sam

    sizes = {
        "hidden_size": NANO.clip_width,
        "intermediate_size": 4 * NANO.clip_width,
        "num_attention_heads": NANO.clip_heads,
        "num_hidden_layers": NANO.clip_layers,
        "image_size": NANO.clip_patch_size * NANO.grid_side,
        "patch_size": NANO.clip_patch_size,
    }
    stock.build_sam_vit_b = build_sam
    stock.CLIPVisionConfig = lambda **given: CLIPVisionConfig(**{**given, **sizes})
