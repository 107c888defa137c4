"""Which image settings an engine works by and reports, whatever files a checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.transformers_utils.config import get_hf_image_processor_config

from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.nano.build import build_checkpoint
from serving.plugin.modes.image_config import read_image_config
from serving.plugin.modes.resolution import ResolutionMode
from serving.plugin.modes.selection import ModeRules
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.work_estimate import read_images

PRE, PRO = "preprocessor_config.json", "processor_config.json"
NANO = ResolutionMode(512, 512, False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return build_checkpoint(tmp_path, random=True)


def model_config(folder: Path) -> Any:
    """As vLLM's: it reads the one file through transformers."""
    return SimpleNamespace(
        model=str(folder), revision=None, hf_image_processor_config=get_hf_image_processor_config(folder)
    )


@pytest.mark.parametrize("missing", [(), (PRE,), (PRO,)])
def test_either_file_will_do(checkpoint: Path, missing: tuple[str, ...]) -> None:
    for name in missing:
        (checkpoint / name).unlink()
    assert ModeRules.from_config(read_image_config(model_config(checkpoint))).own == NANO


def test_without_any_it_is_as_published(checkpoint: Path) -> None:
    for name in (PRE, PRO):
        (checkpoint / name).unlink()
    assert ModeRules.from_config(read_image_config(model_config(checkpoint))).own == ResolutionMode()


def test_what_transformers_reads_goes_first(checkpoint: Path) -> None:
    for name, size in ((PRE, 640), (PRO, 1024)):
        found = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**found, "base_size": size, "image_size": size}))
    assert ModeRules.from_config(read_image_config(model_config(checkpoint))).own == ResolutionMode(640, 640, False)
    nested = {"image_processor": {"base_size": 1280, "image_size": 1280, "crop_mode": False}}
    (checkpoint / PRO).write_text(json.dumps(nested))
    assert ModeRules.from_config(read_image_config(model_config(checkpoint))).own == ResolutionMode(1280, 1280, False)


@pytest.mark.parametrize(("missing", "mode", "num_tokens"), [((PRE,), "tiny", 73), ((PRE, PRO), "gundam", 903)])
def test_a_router_counts_by_what_the_engine_reports(
    checkpoint: Path, missing: tuple[str, ...], mode: str, num_tokens: int
) -> None:
    for name in missing:
        (checkpoint / name).unlink()
    reported = ModeRules.from_config(read_image_config(model_config(checkpoint))).as_config()
    record = ReplicaRecord("a", "nano", "http://a", ReplicaState.READY, image_config=reported)
    request = RoutedRequest("/v1/chat/completions", "nano", b"", True, True, image_sizes=((1654, 2339),))
    reading = read_images(request, record)
    assert (reading.modes, reading.num_tokens) == ((mode,), num_tokens)


SIDES = st.integers(1, 20).map(lambda number: 64 * number)


@given(SIDES, SIDES, st.booleans(), st.integers(1, 9), st.integers(2, 9), st.floats(0.01, 2))
def test_rules_that_are_reported_are_the_same_rules(
    base: int, side: int, crops: bool, least: int, most: int, scale: float
) -> None:
    rules = ModeRules(ResolutionMode(base, side, crops, min(least, most), most), scale)
    assert ModeRules.from_config(dict(rules.as_config())) == rules
