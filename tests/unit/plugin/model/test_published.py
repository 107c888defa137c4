"""The published checkpoint's file set, names and widths, by a stand-in with few layers and random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.loading import LoadedModel, engine_config, load_model, one_process_world
from benchmarks.reference_encoder import ReferenceEncoder, relative_error
from benchmarks.stand_in import INDEX_FILE, SMALL, WEIGHTS_FILE, Choices, every_file_set, write_documents
from serving.plugin.images.page_views import build_views
from serving.plugin.modes.image_config import read_image_config
from serving.plugin.modes.selection import MODES, ModeRules

GREY = (127, 127, 127)
LARGE_VIEWS = [pytest.param(name, marks=pytest.mark.slow) for name in ("small", "base", "large", "gundam")]
"""Up to a minute each: attention among as many as 6,400 places, twice."""


@pytest.fixture(scope="module", autouse=True)
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process_world(tmp_path_factory.mktemp("world")):
        yield


@pytest.fixture(scope="module")
def loaded(published: Path) -> LoadedModel:
    return load_model(published, "float32")


@pytest.fixture(scope="module")
def reference(published: Path) -> ReferenceEncoder:
    return ReferenceEncoder(published / WEIGHTS_FILE, SMALL)


def test_every_parameter_is_loaded_and_no_tensor_of_the_file_is_left_over(loaded: LoadedModel, published: Path) -> None:
    """But CLIP's `position_ids`, which some files have: the numbers 0, 1, 2, ..."""
    assert loaded.blank == []
    with safe_open(published / WEIGHTS_FILE, "pt") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    assert {*json.loads((published / INDEX_FILE).read_text())["weight_map"]} == {*sizes}
    assert sizes.pop("model.vision_model.embeddings.position_ids") == 257
    assert loaded.num_values == sum(sizes.values())


def build_page(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    blocks = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])


def encode_both(model: Any, reference: ReferenceEncoder, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of one page in a mode: the model's, and the reference's in float64."""
    size = (1000, 700) if mode == "gundam" else (600, 800)
    views = build_views(build_page(*size), MODES[mode], GREY)
    page, tiles = views.global_view, views.tiles
    grid = (views.grid.columns, views.grid.rows)
    with torch.no_grad():
        (found,) = model.embed_multimodal(
            pixel_values=page[None], images_crop=[tiles], images_spatial_crop=torch.tensor([grid])
        )
        wanted = reference.encode_page(page, tiles, grid)
    assert found.shape == wanted.shape == (MODES[mode].num_tokens(*size), SMALL.hidden_size)
    return found, wanted


@pytest.mark.parametrize("mode", ["tiny", *LARGE_VIEWS])
def test_features_equal_the_papers_encoder(loaded: LoadedModel, reference: ReferenceEncoder, mode: str) -> None:
    assert relative_error(*encode_both(loaded.model, reference, mode)) < 2e-6


@pytest.mark.parametrize("mode", [pytest.param("tiny", marks=pytest.mark.slow), *LARGE_VIEWS])
def test_features_in_bfloat16_are_near(published: Path, reference: ReferenceEncoder, mode: str) -> None:
    """Slow where the processor has to emulate bfloat16."""
    model = load_model(published, "bfloat16").model
    assert model.image_newline.dtype == torch.bfloat16
    assert relative_error(*encode_both(model, reference, mode)) < 2e-2


@pytest.mark.parametrize("files", every_file_set())
def test_modes_are_known_whichever_files_there_are(tmp_path: Path, files: tuple[str, ...]) -> None:
    config = engine_config(write_documents(tmp_path, Choices(image_files=files)), "float32")
    settings = read_image_config(config.model_config)
    assert bool(settings) == bool(files)
    rules = ModeRules.from_config(settings)
    assert [choice.name for choice in rules.choose({}, {}, [(1654, 2339)])] == ["gundam"]
    assert rules.own.num_tokens(1654, 2339) == 903
    (tiny,) = rules.choose({"mode": "tiny"}, {}, [(1654, 2339)])
    assert tiny.mode.num_tokens(1654, 2339) == 73


def test_the_engine_is_configured_as_for_the_published_one(tmp_path: Path) -> None:
    config = engine_config(write_documents(tmp_path, Choices()), "auto")
    assert config.model_config.dtype == torch.bfloat16
    text = config.model_config.hf_text_config
    assert (text.n_routed_experts, text.num_experts_per_tok, text.n_shared_experts) == (64, 6, 2)
    assert config.model_config.get_head_size() == 128
    assert config.model_config.logits_processors == ["serving.plugin.repetition.ngram_guard:NGramGuard"]
    assert config.scheduler_config.scheduler_cls == "serving.plugin.repetition.loop_stop.build_scheduler"
