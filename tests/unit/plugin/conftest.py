"""Shared by the plugin's tests: vLLM's own implementation as the reference."""

from __future__ import annotations

import types
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and torch's imports warn of themselves; ours are not meant here
    from support.stock_model import import_stock

    _STOCK = import_stock()


@pytest.fixture(scope="session")
def stock() -> types.ModuleType:
    """vLLM's module `deepseek_ocr`, imported without torchvision."""
    return _STOCK


@pytest.fixture(scope="session")
def stock_processing() -> types.ModuleType:
    """vLLM's module with the tiling and the pixel transforms."""
    from vllm.transformers_utils.processors import deepseek_ocr

    return deepseek_ocr


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the published file set, names and widths, two layers of each kind, and random weights."""
    from benchmarks.stand_in import Choices, write_stand_in

    return write_stand_in(tmp_path_factory.mktemp("published"), Choices(with_position_ids=True))
