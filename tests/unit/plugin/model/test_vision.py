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

from benchmarks.stock import patch_sizes
from serving.nano.config import NANO, build_model_config
from serving.plugin.model import sam_cpu
from serving.plugin.model.sam_cpu import embed_patches, turn_weights
from serving.plugin.model.vision import SamEncoder, VisionSizes, normalise, views_per_batch

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


def test_views_are_batched_within_the_bounds() -> None:
    published, nano = read(PUBLISHED), read(build_model_config()["vision_config"])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sides = (512, 640, 1024, 1280)
    assert [views_per_batch(published, side, torch.bfloat16, gpu) for side in sides] == [16, 16, 8, 5]
    assert views_per_batch(published, 1024, torch.float32, gpu) == 4
    assert views_per_batch(published, 1024, torch.bfloat16, torch.device("xpu")) == 1  # the bias is not fused
    assert [views_per_batch(nano, size, torch.float32, cpu) for size in (512, 640, 1024)] == [4, 2, 1]
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


MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
HALF = (0.5, 0.5, 0.5)

Channels = tuple[float, ...]


def build_pair(mean: Channels = MEAN, std: Channels = STD, **sizes: Any) -> tuple[SamEncoder, nn.Module]:
    """Ours, and vLLM's own with the same random weights."""
    wanted = dataclasses.replace(NANO, **sizes)
    stock = types.ModuleType("stock")
    patch_sizes(stock, wanted)
    theirs: nn.Module = stock.build_sam_vit_b()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = SamEncoder(read(build_model_config(wanted)["vision_config"]), mean, std)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_pixels(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("size", [256, 512, 640])
@pytest.mark.parametrize("window", [8, 14], ids=["windows that fit", "windows that do not"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_features_of_bytes_are_those_of_vllms_own_encoder(size: int, window: int, is_turned: bool) -> None:
    ours, theirs = build_pair(sam_window=window, sam_layers=2)
    if is_turned:
        turn_weights(ours)
    pixels = random_pixels(2, size)
    wanted = theirs(normalise(pixels, MEAN, STD, torch.float32))
    found = ours(pixels)
    assert found.shape == wanted.shape
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_gradients_may_be_on() -> None:
    ours, theirs = build_pair(sam_layers=2)
    turn_weights(ours)
    pixels = random_pixels(2, 256)
    found = ours(pixels)
    assert not found.requires_grad
    torch.testing.assert_close(found, theirs(normalise(pixels, MEAN, STD, torch.float32)).detach(), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 3, 16], ids=["a row at a time", "the last part is smaller", "all rows"])
def test_attention_over_the_page_is_vllms_own_however_much_bias_is_made_at_once(
    monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    ours, theirs = build_pair(sam_layers=2)
    assert ours.blocks[1].window_size == 0
    places = 16 * 16
    monkeypatch.setattr(sam_cpu, "_BIAS_BYTES", num_rows * NANO.sam_heads * 16 * places * 4)
    pixels = random_pixels(2, 256)
    wanted = theirs(normalise(pixels, MEAN, STD, torch.float32))
    torch.testing.assert_close(ours(pixels), wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_is_embedded_as_exactly_as_by_vllms_own_encoder() -> None:
    ours, theirs = build_pair(HALF, HALF, sam_layers=1)
    for parameter in (theirs.pos_embed, theirs.patch_embed.proj.bias):
        parameter.zero_()  # what remains is almost nothing, and layer norm makes it as large as print
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.full((1, 3, 256, 256), 127, dtype=torch.uint8)
    found, stock = ours(pixels), theirs(normalise(pixels, HALF, HALF, torch.float32))
    exact = theirs.double()(normalise(pixels, HALF, HALF, torch.float64))
    error, stock_error = ((each - exact).abs().max() for each in (found, stock))
    assert error <= 4 * stock_error + 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "view", ["part of a larger buffer", "off a word's begin", "every other byte", "patches of 8 pixels"]
)
def test_patches_are_cut_however_the_bytes_lie(view: str) -> None:
    pixels = random_pixels(2, 64)
    if view == "off a word's begin":
        pixels = torch.frombuffer(bytearray(1 + pixels.numel()), dtype=torch.uint8, offset=1).view(pixels.shape)
        pixels.random_(256)
        assert pixels.storage_offset() == 0
    elif view == "part of a larger buffer":
        pixels = torch.randint(0, 256, (7 + pixels.numel(),), dtype=torch.uint8)[7:].view(pixels.shape)
    elif view == "every other byte":
        pixels = random_pixels(2, 128)[..., ::2, ::2]
    patch = 8 if view == "patches of 8 pixels" else 16
    weight, bias = torch.randn(3 * patch**2, 5) / 2000, torch.randn(64 // patch, 64 // patch, 5)
    wanted = nn.functional.conv2d(pixels.float() - 128, weight.t().reshape(5, 3, patch, patch), stride=patch)
    found = embed_patches(pixels, weight, bias)
    torch.testing.assert_close(found, wanted.permute(0, 2, 3, 1) + bias, atol=1e-4, rtol=0)


@torch.no_grad()
def test_weights_that_change_in_place_or_are_loaded_anew_change_the_features() -> None:
    ours, theirs = build_pair(sam_layers=1, sam_global_layers=())
    turn_weights(ours)
    pixels = random_pixels(1, 256)
    floats = normalise(pixels, MEAN, STD, torch.float32)
    torch.testing.assert_close(ours(pixels), theirs(floats), atol=1e-4, rtol=0)
    for encoder in (ours, theirs):
        encoder.patch_embed.proj.weight.mul_(2)
        encoder.blocks[0].attn.rel_pos_h.mul_(3)
    torch.testing.assert_close(ours(pixels), theirs(floats), atol=1e-4, rtol=0)
    other, _ = build_pair(sam_layers=1, sam_global_layers=())
    for encoder in (ours, theirs):
        encoder.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(pixels), theirs(floats), atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_dtypes_go_through_vllms_own_layers() -> None:
    ours, theirs = build_pair(sam_layers=1, sam_global_layers=())
    pixels = random_pixels(1, 64)
    wanted = theirs.double()(normalise(pixels, MEAN, STD, torch.float64))
    torch.testing.assert_close(ours.double()(pixels), wanted, atol=1e-6, rtol=0)
