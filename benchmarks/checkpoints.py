"""Checkpoints with random weights for measurements: the nano one, and one so small that it costs next to nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.numpy import save_file

from benchmarks.stock import SIZES_FILE
from serving.nano.build import build_random_weights
from serving.nano.config import NANO, NanoConfig, build_model_config, build_processor_config
from serving.nano.tokenizer import build_special_tokens_map, build_tokenizer_config, build_tokenizer_json

NEARLY_FREE = NanoConfig(
    sam_width=64,
    sam_layers=1,
    sam_heads=1,
    sam_global_layers=(),
    downsample_channels=(64, 64),
    clip_width=64,
    clip_layers=1,
    clip_heads=1,
    hidden_size=64,
    num_layers=1,
    num_heads=1,
    dense_size=64,
)
"""One layer of each kind, 64 wide: to everything around it, what a GPU looks like."""


def write_checkpoint(out: Path, sizes: NanoConfig = NANO) -> Path:
    """Write a checkpoint of these sizes with seeded random weights, in the published dynamic mode (1024/640/true)."""
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor_config(sizes)
    for key in ("base_size", "image_size", "crop_mode"):
        processor.pop(key)
    documents = {
        "config.json": build_model_config(sizes) | {"torch_dtype": "float32"},
        "preprocessor_config.json": processor,
        "processor_config.json": processor,
        "special_tokens_map.json": build_special_tokens_map(),
        "tokenizer.json": build_tokenizer_json(),
        "tokenizer_config.json": build_tokenizer_config(sizes.max_positions),
        SIZES_FILE: dataclasses.asdict(sizes),
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, ensure_ascii=False))
    save_file(build_random_weights(sizes), out / "model.safetensors", {"format": "pt"})
    return out
