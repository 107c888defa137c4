"""Pages at other sizes than the native one: the same pixels and positions as the serving side's."""

from __future__ import annotations

import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models.deepencoder import DeepCLIPVisionEmbeddings

from serving.nano.config import NANO, build_model_config
from serving.nano.pages import CORE, RenderedPage, sample_page
from serving.nano.training.batches import resize_view
from serving.nano.training.model import NanoOcr
from serving.plugin.images.page_views import build_views
from serving.plugin.model.vision import SamEncoder, VisionSizes, normalise
from serving.plugin.modes.selection import MODES

SIZES = (512, 640, 1024, 1280)


@pytest.fixture(autouse=True)
def _vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(scope="module")
def page() -> RenderedPage:
    return sample_page(CORE, "train", 0, 3)


@pytest.fixture(scope="module")
def model() -> NanoOcr:
    torch.manual_seed(0)
    model = NanoOcr()
    for name, parameter in model.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("mode", ["tiny", "small", "base", "large", "gundam"])
def test_views_are_those_of_the_serving_side(page: RenderedPage, mode: str) -> None:
    colour = Image.fromarray(page.pixels).convert("RGB")
    served = build_views(colour, MODES[mode], (127, 127, 127))
    ours = resize_view(page.pixels, MODES[mode].base_size)
    assert served.grid.num_tiles == 0
    difference = np.abs(served.global_view.numpy().astype(int) - ours)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.005


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_first_encoder_is_the_serving_sides(model: NanoOcr, size: int) -> None:
    sizes = VisionSizes.from_config(types.SimpleNamespace(**build_model_config()["vision_config"]))
    served = SamEncoder(sizes)
    served.load_state_dict(model.model.sam_model.state_dict())
    shape, random = (1, 3, size, size), torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    floats = normalise(pixels, (0.5,) * 3, (0.5,) * 3, torch.float32)
    torch.testing.assert_close(model.model.sam_model(floats)[1], served(pixels), atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_second_encoders_positions_are_the_serving_sides(model: NanoOcr, size: int) -> None:
    ours = model.model.vision_model.embeddings
    clip = build_model_config()["vision_config"]["width"]["clip-l-14-224"]
    config = CLIPVisionConfig(
        hidden_size=clip["width"], image_size=clip["image_size"], patch_size=clip["patch_size"], num_attention_heads=4
    )
    served = DeepCLIPVisionEmbeddings(config)
    served.load_state_dict(ours.state_dict())
    side = size // NANO.cell_size
    patches = torch.randn(1, NANO.clip_width, side, side, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(ours(patches), served(torch.zeros(1), patches))
