"""Views against vLLM's own preprocessing: the same crops, the same padding, the same pixels."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from serving.plugin.images.page_views import build_views
from serving.plugin.model.vision import normalise
from serving.plugin.modes.resolution import ResolutionMode

GREY = (127, 127, 127)
ODD_SIZES = [(1, 1), (1, 5000), (5000, 1), (639, 640), (640, 640), (641, 640), (1654, 2339), (2339, 1654), (1300, 1290)]


def build_page(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width + 7 * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def reference(stock_processing: types.ModuleType) -> types.SimpleNamespace:
    """vLLM's processor around a tokenizer that knows just enough."""
    tokenizer = types.SimpleNamespace(
        encode=lambda text, **_: [5] * len(text), bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    processor = object.__new__(stock_processing.DeepseekOCRProcessor)
    processor.__dict__.update(
        tokenizer=tokenizer,
        image_token="<image>",
        image_token_id=3,
        ignore_id=-100,
        image_size=640,
        base_size=1024,
        max_crops=6,
        strategy="v1",
        patch_size=16,
        downsample_ratio=4,
        image_transform=stock_processing.ImageTransform(),
    )
    return types.SimpleNamespace(
        views=lambda page: processor.tokenize_with_images("<image>", [page]), processor=processor
    )


@pytest.mark.parametrize("size", ODD_SIZES)
def test_dynamic_mode_makes_vllms_views(reference: types.SimpleNamespace, size: tuple[int, int]) -> None:
    page = build_page(*size)
    _, global_view, tiles, _, grid, num_tokens, _ = reference.views(page)
    mode = ResolutionMode()
    ours = build_views(page, mode, GREY)
    half = (0.5, 0.5, 0.5)
    assert (ours.grid.columns, ours.grid.rows) == tuple(grid[0].tolist())
    assert mode.num_grid_tokens(ours.grid) == num_tokens[0]
    torch.testing.assert_close(normalise(ours.global_view[None], half, half, torch.float32), global_view)
    assert ours.tiles.shape == tiles.shape
    if ours.grid.is_tiled:
        torch.testing.assert_close(normalise(ours.tiles, half, half, torch.float32), tiles)


def test_numba_is_not_imported_before_a_page_is_resampled() -> None:
    """An engine that starts in the same process on a CPU would fail (vLLM 0.32, `_rebind_kernels`)."""
    modules = "serving.plugin.model.renderer, serving.plugin.repetition.ngram_guard"
    code = f"import sys, {modules}; print('numba' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("side", [512, 640])
def test_small_modes_show_the_whole_page_squeezed(side: int) -> None:
    page = build_page(300, 900)
    views = build_views(page, ResolutionMode(side, side, False), GREY)
    expected = np.asarray(page.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(views.global_view.numpy(), expected)
    assert views.tiles.shape == (0, 3, side, side)


def test_large_modes_pad_the_page_with_the_mean_colour() -> None:
    page = Image.new("RGB", (1024, 512), "red")
    view = build_views(page, ResolutionMode(1024, 1024, False), GREY).global_view
    assert (view[:, :256] == 127).all()
    assert (view[:, 768:] == 127).all()
    assert (view[0, 256:768] == 255).all()
    assert (view[1:, 256:768] == 0).all()


def test_pixels_stay_bytes_until_the_model_normalises_them() -> None:
    views = build_views(build_page(1300, 700), ResolutionMode(), GREY)
    assert views.global_view.dtype == views.tiles.dtype == torch.uint8


def test_normalising_rounds_once_into_a_narrow_dtype() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    exact = normalise(pixels, mean, std, torch.float32)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(exact, expected.float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(normalise(pixels, mean, std, torch.bfloat16), exact.to(torch.bfloat16))
