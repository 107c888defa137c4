"""The vision encoder over the pages of several requests: together, as the plugin does it, against one at a time.

Nano sizes, float32, CPU time, inside a real engine. The peer is the same layers called view by view, as stock vLLM
calls them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.fastpath.rows import Row, cpu_seconds

NUM_PAGES, REPEATS = 8, 5
SIDES = {"tiny": 512, "small": 640, "base": 1024}
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


def run() -> Iterator[Row]:
    """Pages per CPU second in three modes, the encoder alone."""
    os.environ |= _ENVIRONMENT  # the engine runs in this process, so that the model can be called
    torch.set_num_threads(1)
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder))
        llm = LLM(str(checkpoint), dtype="float32", max_model_len=2048, enforce_eager=True, disable_log_stats=True)
    for name, side in SIDES.items():
        batch, together, alone = llm.apply_model(lambda model, side=side: measure(model, side))[0]
        yield Row.of_rates(
            f"encoder, {NUM_PAGES} pages, {name} ({batch} at once)",
            together,
            alone,
            "one view at a time",
            None,
            "pages per CPU second",
        )


@torch.inference_mode()
def measure(model: Any, side: int) -> tuple[int, float, float]:
    """Views per batch, and pages per CPU second: batched, and one at a time. The features must agree."""
    from serving.plugin.vision import encode_views, views_per_batch

    pages = torch.randn(NUM_PAGES, 3, side, side, generator=torch.Generator().manual_seed(side))
    batch = views_per_batch(model.vision_sizes, side, pages.dtype, pages.device)

    def encode(size: int) -> torch.Tensor:
        parts = (model.sam_model, model.vision_model, model.projector)
        return torch.cat([encode_views(*parts, part) for part in pages.split(size)])

    torch.testing.assert_close(encode(batch), encode(1), atol=1e-4, rtol=0)
    turns = [(cpu_seconds(lambda: encode(batch)), cpu_seconds(lambda: encode(1))) for _ in range(REPEATS)]
    together, alone = (NUM_PAGES / min(times) for times in zip(*turns, strict=True))
    return batch, together, alone
