"""Encoder sizes come from the checkpoint; the published configuration gives the published encoder."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models.deepencoder import build_sam_vit_b

from serving.demo.config import NANO, build_model_config
from serving.plugin.vision import SamEncoder, VisionSizes, views_per_batch

# `vision_config` of deepseek-ai/DeepSeek-OCR
PUBLISHED = {
    "image_size": 1024,
    "width": {
        "clip-l-14-224": {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024},
        "sam_vit_b": {
            "downsample_channels": [512, 1024],
            "global_attn_indexes": [2, 5, 8, 11],
            "heads": 12,
            "layers": 12,
            "width": 768,
        },
    },
}


@pytest.fixture(autouse=True)
def _vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def read(config: dict[str, Any]) -> VisionSizes:
    return VisionSizes.from_config(types.SimpleNamespace(**config))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_the_published_configuration_gives_the_encoder_that_vllm_hard_codes() -> None:
    assert shapes(SamEncoder(read(PUBLISHED))) == shapes(build_sam_vit_b())


def test_the_nano_configuration_gives_its_own_sizes() -> None:
    sizes = read(build_model_config()["vision_config"])
    found = shapes(SamEncoder(sizes))
    first, second = NANO.downsample_channels
    assert found["net_2.weight"] == (first, NANO.neck_channels, 3, 3)
    assert found["net_3.weight"] == (second, first, 3, 3)
    assert found["pos_embed"] == (1, 32, 32, NANO.sam_width)
    head_size = NANO.sam_width // NANO.sam_heads
    in_windows = next(layer for layer in range(NANO.sam_layers) if layer not in NANO.sam_global_layers)
    assert found[f"blocks.{in_windows}.attn.rel_pos_h"] == (2 * NANO.sam_window - 1, head_size)
    assert found[f"blocks.{NANO.sam_global_layers[0]}.attn.rel_pos_h"] == (2 * 32 - 1, head_size)


def test_a_configuration_that_lacks_a_size_says_which() -> None:
    config = {**PUBLISHED, "width": {**PUBLISHED["width"], "sam_vit_b": {"width": 768}}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="layers"):
        read(config)


def test_towers_that_do_not_fit_each_other_are_refused() -> None:
    width = PUBLISHED["width"]
    assert isinstance(width, dict)
    config = {**PUBLISHED, "width": {**width, "clip-l-14-224": {**width["clip-l-14-224"], "width": 512}}}
    with pytest.raises(ValueError, match="512"):
        read(config)


def test_views_are_batched_within_the_memory_bound() -> None:
    published, nano = read(PUBLISHED), read(build_model_config()["vision_config"])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert views_per_batch(published, 640, torch.bfloat16, gpu) == 8
    assert views_per_batch(published, 1024, torch.float32, gpu) == 1
    assert views_per_batch(nano, 512, torch.float32, cpu) == 2
    assert views_per_batch(nano, 512, torch.float32, gpu) > 8
    assert views_per_batch(published, 4096, torch.float32, cpu) == 1  # one view goes through whatever its size


@torch.no_grad()
def test_the_position_table_is_resampled_once_per_size_and_again_when_it_changes() -> None:
    encoder = SamEncoder(read(build_model_config()["vision_config"]))
    torch.nn.init.normal_(encoder.pos_embed)
    small, large = encoder.get_abs_pos(encoder.pos_embed, 20), encoder.get_abs_pos(encoder.pos_embed, 64)
    assert encoder.get_abs_pos(encoder.pos_embed, 20) is small
    assert encoder.get_abs_pos(encoder.pos_embed, 64) is large
    assert (small.shape[1], large.shape[1]) == (20, 64)
    encoder.pos_embed.mul_(2)
    torch.testing.assert_close(encoder.get_abs_pos(encoder.pos_embed, 20), 2 * small)


@torch.no_grad()
@pytest.mark.parametrize(("width", "is_linear"), [(96, False), (768, True)])
def test_patches_are_embedded_the_same_either_way(width: int, is_linear: bool) -> None:
    sizes = dataclasses.replace(read(build_model_config()["vision_config"]), sam_width=width)
    embed = SamEncoder(sizes).patch_embed
    assert embed.proj.enable_linear is is_linear
    for parameter in embed.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    views = torch.randn(2, 3, 64, 48)
    found = embed(views)
    assert found.shape == (2, 4, 3, width)
    assert found.is_contiguous()
    embed.proj.enable_linear = not is_linear
    torch.testing.assert_close(embed(views), found, atol=1e-5, rtol=0)
