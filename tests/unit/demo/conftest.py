"""vLLM's modules are imported here, once and without the warnings that they raise about themselves."""

from __future__ import annotations

import importlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.models.deepencoder")
    importlib.import_module("serving.plugin.vision")
