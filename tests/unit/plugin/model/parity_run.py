"""Run pages through one implementation of the model and save what came out: `parity_run.py ours|stock CHECKPOINT OUT`.

A process of its own, since a process holds one implementation. Not a test itself; `test_parity.py` compares.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
if sys.argv[1] == "stock":
    os.environ["VLLM_PLUGINS"] = "none"  # vLLM loads those of this name, and there are none

import numpy as np
import torch
from PIL import Image

PAGES = {"untiled": (600, 410), "wide": (1900, 700), "tall": (650, 2000), "square": (1000, 990)}
PROMPT = "<image>\nFree OCR."


def build_page(width: int, height: int) -> Image.Image:
    """Coarse blocks with sharp edges, different for every size."""
    generator = np.random.default_rng(width * 10_000 + height)
    blocks = generator.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(10, axis=0).repeat(10, axis=1)[:height, :width])


def record_embeddings(model: Any) -> None:
    """Keep what the model makes of images from now on."""
    embed = model.embed_multimodal
    model.recorded = []

    def recording(**kwargs: Any) -> Any:
        features = embed(**kwargs)
        model.recorded.extend(part.detach().clone() for part in features)
        return features

    model.embed_multimodal = recording


def main(implementation: str, checkpoint: str, out: str) -> None:
    from vllm import LLM, ModelRegistry, SamplingParams

    if implementation == "stock":
        from support.stock_model import import_stock, patch_sizes

        stock = import_stock()
        patch_sizes(stock)
        ModelRegistry.register_model("DeepseekOCRForCausalLM", stock.DeepseekOCRForCausalLM)
    llm = LLM(
        checkpoint,
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        disable_log_stats=True,
    )
    llm.apply_model(record_embeddings)
    results: dict[str, Any] = {"class": llm.apply_model(lambda model: type(model).__module__)[0]}
    for name, size in PAGES.items():
        request = {"prompt": PROMPT, "multi_modal_data": {"image": build_page(*size)}}
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
        answer = llm.generate([request], sampling, use_tqdm=False)[0]
        results[name] = {
            "num_prompt_tokens": len(answer.prompt_token_ids),
            "token_ids": list(answer.outputs[0].token_ids),
            "embeddings": llm.apply_model(lambda model: model.recorded.pop())[0],
        }
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
