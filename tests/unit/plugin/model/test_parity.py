"""The project's model against vLLM's own, with the same random weights: embeddings, prompt lengths, greedy tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT

from serving.nano.build import build_checkpoint

HERE = Path(__file__).parent
PAGES = ("untiled", "wide", "tall", "square")
# 273 of the global view, and the tiles: 1900x700 -> 3x1, 650x2000 -> 1x3, 1000x990 -> 2x2
IMAGE_TOKENS = {"untiled": 273, "wide": 273 + 10 * 31, "tall": 273 + 30 * 11, "square": 273 + 20 * 21}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both implementations run over the same pages, each in a process of its own, at once."""
    folder = tmp_path_factory.mktemp("parity")
    checkpoint = build_checkpoint(folder / "checkpoint", random=True)
    # The published checkpoint names no sizes, which means its dynamic mode; so must ours here.
    for name in ("preprocessor_config.json", "processor_config.json"):
        config = json.loads((checkpoint / name).read_text())
        for key in ("base_size", "image_size", "crop_mode"):
            config.pop(key)
        (checkpoint / name).write_text(json.dumps(config))
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(_run, implementation, checkpoint, folder) for implementation in ("stock", "ours")]
    return {implementation: run.result() for implementation, run in zip(("stock", "ours"), runs, strict=True)}


def _run(implementation: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    out = folder / f"{implementation}.pt"
    command = [sys.executable, "-W", "ignore", *map(str, (HERE / "parity_run.py", implementation, checkpoint, out))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    loaded: dict[str, Any] = torch.load(out)
    return loaded


def test_each_run_used_its_own_implementation(results: dict[str, dict[str, Any]]) -> None:
    assert results["stock"]["class"] == "vllm.model_executor.models.deepseek_ocr"
    assert results["ours"]["class"] == "serving.plugin.model.deepseek_ocr"


@pytest.mark.parametrize("page", PAGES)
def test_image_embeddings_are_the_same(results: dict[str, dict[str, Any]], page: str) -> None:
    ours, stock = (results[name][page]["embeddings"] for name in ("ours", "stock"))
    assert ours.shape == (IMAGE_TOKENS[page], 256)
    assert ours.std() > 0.01  # not a comparison of nothing with nothing
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)


@pytest.mark.parametrize("page", PAGES)
def test_prompts_have_the_same_number_of_tokens(results: dict[str, dict[str, Any]], page: str) -> None:
    ours, stock = (results[name][page]["num_prompt_tokens"] for name in ("ours", "stock"))
    assert ours == stock == 1 + IMAGE_TOKENS[page] + len("\nFree OCR.")


@pytest.mark.parametrize("page", PAGES)
def test_greedy_tokens_are_the_same(results: dict[str, dict[str, Any]], page: str) -> None:
    ours, stock = (results[name][page]["token_ids"] for name in ("ours", "stock"))
    assert len(ours) == 24
    assert ours == stock
