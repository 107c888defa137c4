"""Pages at other sizes than the native one: the same pixels, positions and places as the serving side's."""

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
from serving.nano.training.batches import IGNORED, PAGE_END, Batch, resize_view
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


def test_a_native_view_is_the_page(page: RenderedPage) -> None:
    batch = Batch.from_pages([page])
    assert np.array_equal(batch.pages[0].numpy(), page.pixels)
    side = NANO.grid_side
    columns, rows = batch.columns[0], batch.rows[0]
    assert torch.equal(batch.targets[0], rows // 4 * (side + 1) + columns // 4)


@pytest.mark.parametrize("size", SIZES)
def test_every_place_is_shown_by_one_token_in_the_room_that_it_has_on_a_native_page(
    page: RenderedPage, size: int
) -> None:
    batch = Batch.from_pages([page], view_px=size)
    side = size // NANO.cell_size
    assert batch.pages.shape == (1, size, size)
    assert batch.patch_chars.shape == (1, size // NANO.patch_size, size // NANO.patch_size)
    assert batch.cell_chars.shape == (1, 4 * side, 4 * side)
    rooms = batch.cell_chars[0].view(side, 4, side, 4).permute(0, 2, 1, 3)
    for index, char in enumerate(page.text + chr(PAGE_END)):
        column, row, target = (int(table[0, index]) for table in (batch.columns, batch.rows, batch.targets))
        token = rooms[target // (side + 1), target % (side + 1)]
        center = np.array([column * 16 + 8, row // 2 * 32 + 16]) * size / NANO.image_size
        assert [target % (side + 1), target // (side + 1)] == (center // NANO.cell_size).astype(int).tolist()
        if column < 31 or char not in ("\n", chr(PAGE_END)):
            assert token[row % 4, column % 4] in (ord(char), IGNORED), (index, char)
    native = Batch.from_pages([page]).cell_chars
    assert int((rooms != IGNORED).sum()) == int((native != IGNORED).sum())


@pytest.mark.parametrize("size", SIZES)
def test_tokens_know_whether_text_follows_below(page: RenderedPage, size: int) -> None:
    batch = Batch.from_pages([page], view_px=size)
    known = batch.is_more[0] != IGNORED
    assert int(known.sum()) == 16
    last = int(page.centers[-1, 1]) // 32
    assert int((batch.is_more[0] == 1).sum()) == last
    assert int(batch.is_near_end[0].sum()) == min(last + 1, 2)
