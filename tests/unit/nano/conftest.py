"""One thread for every model; and vLLM's modules, imported once, without the warnings they raise about themselves."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.models.deepencoder")
    importlib.import_module("serving.plugin.model.vision")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait long for one whose core is busy elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
