"""The vLLM plugin: everything that is special about DeepSeek-OCR.

vLLM calls `register` in each of its processes through the entry point group `vllm.general_plugins`, so a bare
`vllm serve` gets it too as soon as this distribution is installed. Importing this package imports neither torch nor
vLLM; the model's module is imported by vLLM when a checkpoint asks for the architecture.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "DeepseekOCRForCausalLM"


def register() -> None:
    """Put this project's model in the place of vLLM's own for the published architecture's name. May run many times."""
    from vllm import ModelRegistry

    from serving.plugin.interfaces.vllm_internals import adapt_engine_config, replace_renderer

    ModelRegistry.register_model(ARCHITECTURE, "serving.plugin.model.deepseek_ocr:DeepseekOCRForCausalLM")
    adapt_engine_config(ARCHITECTURE, _configure)
    replace_renderer("serving.plugin.model.renderer", "PageRenderer")


def _configure(vllm_config: Any) -> None:
    """Switch the n-gram guard and the loop stop on in an engine for this architecture."""
    from serving.plugin.repetition import loop_stop, ngram_guard

    ngram_guard.configure(vllm_config)
    loop_stop.configure(vllm_config)
