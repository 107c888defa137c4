"""A checkpoint's image settings, from whichever file has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_FILE = "processor_config.json"


def read_image_config(model_config: Any) -> Mapping[str, Any]:
    """Return a checkpoint's image settings; empty if it has none.

    transformers reads `preprocessor_config.json`, and only the section `image_processor` of `processor_config.json`.
    Checkpoints in the published form have all settings at the top level of the latter, and some have no other file.

    Args:
        model_config: vLLM's ModelConfig.
    """
    return {**_read_file(str(model_config.model), model_config.revision), **model_config.hf_image_processor_config}


@lru_cache(maxsize=8)
def _read_file(model: str, revision: str | None) -> Mapping[str, Any]:
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    found = get_hf_file_to_dict(_FILE, model, revision)
    return found if isinstance(found, dict) else {}
