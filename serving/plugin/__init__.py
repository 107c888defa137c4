"""The vLLM plugin: everything that is specific to DeepSeek-OCR and its family.

vLLM calls `register` in each of its processes through the entry point group `vllm.general_plugins`, so a bare
`vllm serve` uses it too once this distribution is installed. Importing this package imports neither torch nor vLLM;
vLLM imports the model's module when a checkpoint names the architecture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = Path(__file__).parent / "model" / "chat_template.jinja"


def register() -> None:
    """Register this project's model instead of vLLM's own for the published architecture. May be called repeatedly."""
    from vllm import ModelRegistry

    from serving.plugin.interfaces.vllm_internals import adapt_engine_config, replace_renderer, set_chat_template
    from serving.plugin.modes.families import DEEPSEEK_OCR, FAMILIES

    ModelRegistry.register_model(DEEPSEEK_OCR.architecture, "serving.plugin.model.deepseek_ocr:DeepseekOCRForCausalLM")
    for architecture in FAMILIES:
        adapt_engine_config(architecture, _configure)
    replace_renderer("serving.plugin.model.renderer", "PageRenderer")
    set_chat_template("deepseek_ocr", CHAT_TEMPLATE)


def _configure(vllm_config: Any) -> None:
    """Enable the n-gram guard and the loop stop in an engine for a model of the table of families."""
    from serving.plugin.repetition import loop_stop, ngram_guard

    ngram_guard.configure(vllm_config)
    loop_stop.configure(vllm_config)
