"""The vision encoder over eight pages: as the plugin's engine calls it, against vLLM's own, which goes page by page.

Nano sizes, float32, CPU time, inside a real engine. Each side begins with what its engine is handed: bytes here, the
floats of its processor there. Both have the same weights, and the features must agree.
"""

from __future__ import annotations

import os
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.fastpath.rows import Row, cpu_seconds
from benchmarks.stock import NAME, import_stock, patch_sizes
from serving.nano.config import NANO

NUM_PAGES, REPEATS = 8, 5
SIDES = {"tiny": 512, "small": 640, "base": 1024}
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


def run() -> Iterator[Row]:
    """Pages per CPU second in three modes, the encoder alone."""
    os.environ |= _ENVIRONMENT  # the engine runs in this process, so that the model can be called
    torch.set_num_threads(1)
    from vllm import LLM
    from vllm.config import set_current_vllm_config

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder))
        llm = LLM(str(checkpoint), dtype="float32", max_model_len=2048, enforce_eager=True, disable_log_stats=True)
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        stock = llm.apply_model(build_stock)[0]
    for name, side in SIDES.items():
        ours, peer = llm.apply_model(lambda model, side=side: measure(model, stock, side))[0]
        measure_name = f"encoder, {NUM_PAGES} pages, {name}"
        yield Row.of_rates(measure_name, ours, peer, f"{NAME}, page by page", None, "pages per CPU second")


def build_stock(model: Any) -> Any:
    """What the vision part of vLLM's own model takes, with the weights of ours.

    vLLM has packed those of the CLIP-style encoder for this CPU already, so both sides share that and the projector:
    they are vLLM's own in ours too.
    """
    module = import_stock()
    patch_sizes(module, NANO)
    sam = module.build_sam_vit_b()
    sam.load_state_dict(model.sam_model.state_dict())
    parts = {"vision_model": model.vision_model, "projector": model.projector, "image_newline": model.image_newline}
    own = module.DeepseekOCRForCausalLM
    stock = types.SimpleNamespace(sam_model=sam, view_seperator=model.view_seperator, **parts)
    names = ("_encode_global_features", "_encode_local_features", "_assemble_patch_grid", "_pixel_values_to_embedding")
    for name in names:
        setattr(stock, name, types.MethodType(getattr(own, name), stock))
    return stock


@torch.inference_mode()
def measure(model: Any, stock: Any, side: int) -> tuple[float, float]:
    """Pages per CPU second of both. Untiled pages, which have no more than their global view."""
    pages = torch.randint(0, 256, (NUM_PAGES, 3, side, side), generator=torch.Generator().manual_seed(side))
    floats, no_tiles, grids = pages / 127.5 - 1, torch.empty(0, 3, side, side), torch.ones(NUM_PAGES, 2).long()
    given = {"pixel_values": pages.to(torch.uint8), "images_crop": no_tiles.expand(NUM_PAGES, 0, 3, side, side)}

    def encode() -> torch.Tensor:
        return torch.stack(model.embed_multimodal(**given, images_spatial_crop=grids))

    def encode_stock() -> torch.Tensor:
        return torch.stack(stock._pixel_values_to_embedding(floats, no_tiles, grids))

    torch.testing.assert_close(encode(), encode_stock(), atol=1e-4, rtol=0)
    turns = [(cpu_seconds(encode), cpu_seconds(encode_stock)) for _ in range(REPEATS)]
    ours, peer = (NUM_PAGES / min(times) for times in zip(*turns, strict=True))
    return ours, peer
