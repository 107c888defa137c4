"""On a device a step's pages are encoded without the host waiting for anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_waits import DEVICE, HostWaits

from benchmarks.loading import build_blank_model, one_process_world
from benchmarks.stand_in import SMALL, Choices, write_documents
from serving.plugin.modes.selection import MODES


@pytest.fixture(scope="module", autouse=True)
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process_world(tmp_path_factory.mktemp("world")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("published")
    return build_blank_model(write_documents(folder, Choices()), DEVICE)


def pages(*grids: tuple[int, int]) -> dict[str, Any]:
    """Gundam pages as the processor gives them: pixels on the device, grids on the host."""

    def views(count: int, side: int) -> torch.Tensor:
        return torch.empty((count, 3, side, side), dtype=torch.uint8, device=DEVICE)

    return {
        "pixel_values": views(len(grids), 1024),
        "images_crop": [views(columns * rows if columns * rows > 1 else 0, 640) for columns, rows in grids],
        "images_spatial_crop": torch.tensor(grids),
    }


@torch.inference_mode()
def test_pages_are_encoded_without_a_copy_or_a_wait(model: Any) -> None:
    model.embed_multimodal(**pages((1, 1)))  # what is sent once
    given = pages((2, 3), (1, 1), (3, 2))
    with HostWaits() as seen:
        features = model.embed_multimodal(**given)
    assert [tuple(page.shape) for page in features] == [
        (MODES["gundam"].num_tokens(*size), SMALL.hidden_size) for size in ((1280, 1920), (640, 640), (1920, 1280))
    ]
    assert seen.waits == []
    assert seen.num_copies == 0
    assert seen.num_launches > 100


@torch.inference_mode()
def test_clip_runs_once_for_each_size_of_view(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, int]] = []
    for name in ("sam_model", "vision_model"):
        forward = getattr(model, name).forward
        monkeypatch.setattr(getattr(model, name), "forward", note(runs, name, forward))
    model.embed_multimodal(**pages(*[(2, 3)] * 3))
    views = [count for name, count in runs if name == "sam_model"]
    assert sum(views) == 3 + 18
    assert max(views) <= 16
    assert [count for name, count in runs if name == "vision_model"] == [3, 18]


def note(runs: list[tuple[str, int]], name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(views: torch.Tensor, *rest: Any) -> Any:
        runs.append((name, len(views)))
        return forward(views, *rest)

    return run
