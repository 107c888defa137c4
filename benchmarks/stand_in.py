"""`python -m benchmarks.stand_in DIR`: a checkpoint that looks like the published one to every reader, from a seed.

It has the published file set, names, widths, `config.json` and token ids of deepseek-ai/DeepSeek-OCR with random
weights, and as many layers, tokens and expert rows as asked for: at full size it would take 6.7 GB. What the published
repository could not be asked for from here (which of the two files with the image settings it has, whether table cells
are special tokens) is a parameter, so that tests can cover each case.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from serving.nano.build import weight_shapes
from serving.nano.config import NanoConfig, build_processor_config
from serving.nano.tokenizer import BOS, EOS, PAD, byte_symbols

WEIGHTS_FILE = "model-00001-of-000001.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
CELLS = ("<td>", "</td>", "<tr>", "</tr>")
PUBLISHED = NanoConfig(
    image_size=1024,
    sam_width=768,
    sam_layers=12,
    sam_heads=12,
    sam_global_layers=(2, 5, 8, 11),
    sam_window=14,
    neck_channels=256,
    downsample_channels=(512, 1024),
    clip_width=1024,
    clip_layers=24,
    clip_heads=16,
    hidden_size=1280,
    num_layers=12,
    num_heads=10,
    dense_size=6848,
    expert_size=896,
    num_experts=64,
    num_experts_per_token=6,
    num_shared_experts=2,
    vocab_size=129_280,
)
"""The published sizes."""
SMALL = replace(
    PUBLISHED, sam_layers=2, sam_global_layers=(1,), clip_layers=2, num_layers=2, expert_size=32, vocab_size=384
)
"""The published widths in two layers of each kind, with narrow experts and few tokens: 150 MB, written in a second."""

_PUBLISHED_IDS = {"<image>": 128_815, "<td>": 128_821, "</td>": 128_822}
"""Ids of the published vocabulary that recipes name."""
_OTHER_SPECIAL = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>")


@dataclass(frozen=True, slots=True)
class Choices:
    """What may differ from one checkpoint in the published format to the next."""

    sizes: NanoConfig = SMALL
    image_files: tuple[str, ...] = (PROCESSOR_FILE,)
    """Which of `preprocessor_config.json` and `processor_config.json` there are."""
    cells_are_special: bool = True
    """Whether the tags of table cells are special tokens, which decoding may skip, or ordinary ones."""
    with_position_ids: bool = False
    """Whether the weights hold CLIP's `position_ids`, as files that were saved by older libraries do."""


def build_config(sizes: NanoConfig) -> dict[str, Any]:
    """Return `config.json` with the published keys: those of the decoder stand nested and at the top level."""
    language = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseekv2.DeepseekV2Config",
            "AutoModel": "modeling_deepseek.DeepseekV2Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": sizes.num_dense_layers,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.dense_size,
        "kv_lora_rank": None,
        "lm_head": True,
        "max_position_embeddings": sizes.max_positions,
        "moe_intermediate_size": sizes.expert_size,
        "n_group": 1,
        "n_routed_experts": sizes.num_experts,
        "n_shared_experts": sizes.num_shared_experts,
        "num_attention_heads": sizes.num_heads,
        "num_experts_per_tok": sizes.num_experts_per_token,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_heads,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": sizes.vocab_size,
    }
    return {
        "_name_or_path": "deepseek-ai/DeepSeek-OCR",
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "architectures": ["DeepseekOCRForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig",
            "AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM",
        },
        "language_config": language,
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": sizes.clip_width + sizes.downsample_channels[1],
            "model_type": "mlp_projector",
            "n_embed": sizes.hidden_size,
            "projector_type": "linear",
        },
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "vision_config": _build_vision_config(sizes),
        **{key: value for key, value in language.items() if key not in ("architectures", "auto_map", "torch_dtype")},
    }


def _build_vision_config(sizes: NanoConfig) -> dict[str, Any]:
    """Return the encoder's part; the published one has neither SAM's window nor the width of its neck."""
    clip = {"heads": sizes.clip_heads, "image_size": 224, "layers": sizes.clip_layers, "patch_size": 14}
    sam = {
        "downsample_channels": list(sizes.downsample_channels),
        "global_attn_indexes": list(sizes.sam_global_layers),
        "heads": sizes.sam_heads,
        "layers": sizes.sam_layers,
        "width": sizes.sam_width,
    }
    return {
        "image_size": 1024,
        "mlp_ratio": 3.7362,
        "model_name": "deeplip_b_l",
        "model_type": "vision",
        "width": {"clip-l-14-224": {**clip, "width": sizes.clip_width}, "sam_vit_b": sam},
    }


def build_image_settings() -> dict[str, Any]:
    """Return the published image settings, which name no sizes of views."""
    settings = build_processor_config(PUBLISHED)
    for key in ("base_size", "image_size", "crop_mode"):
        del settings[key]
    return settings


def token_ids(vocab_size: int) -> dict[str, int]:
    """Return the id of every named token: the published ones where the vocabulary reaches so far."""
    named = (*_PUBLISHED_IDS, *CELLS[2:], *_OTHER_SPECIAL)
    first = min(_PUBLISHED_IDS["<td>"] + 2, vocab_size - len(named))
    ids = {name: first + place for place, name in enumerate(named)}
    if vocab_size == PUBLISHED.vocab_size:
        ids |= _PUBLISHED_IDS
    return {BOS: 0, EOS: 1, PAD: 2, **ids}


def build_tokenizer_files(choices: Choices) -> dict[str, dict[str, Any]]:
    """Return the tokenizer's files: a token for each byte, from id 3, and the named ones."""
    ids = token_ids(choices.sizes.vocab_size)
    ordinary = () if choices.cells_are_special else CELLS
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": id_, "content": name, **flags, "special": name not in ordinary} for name, id_ in ids.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        # With the named tokens: those that it lacks would be given the ids after its last.
        "vocab": {**ids, **{symbol: 3 + byte for byte, symbol in enumerate(byte_symbols())}},
        "merges": [],
    }
    start = {"SpecialToken": {"id": BOS, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    special = [name for name in ids if name not in (BOS, EOS, PAD, *ordinary)]
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": template,
            "decoder": byte_level,
            "model": model,
        },
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": special,
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": choices.sizes.max_positions,
            "pad_token": PAD,
            "tokenizer_class": "LlamaTokenizerFast",
        },
        "special_tokens_map.json": {
            "additional_special_tokens": special,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
        },
    }


def build_weights(sizes: NanoConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return seeded random weights under the published names, biases and norms included, which are never neutral."""
    return {name: _draw(name, shape, dtype) for name, shape in published_shapes(sizes).items()}


def published_shapes(sizes: NanoConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor; CLIP's table of positions has the 16 x 16 places of a 224-pixel picture."""
    return weight_shapes(sizes)


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(shape).normal_(generator=generator)
    if len(shape) == 1:
        is_scale = name.endswith(".weight")
        return values.mul_(0.1).add_(1.0 if is_scale else 0.0).to(dtype)
    fan_in = shape[-1] if "rel_pos" in name or "pos" in name else values[0].numel()
    return values.mul_(fan_in**-0.5).to(dtype)


def write_stand_in(out: Path, choices: Choices = Choices()) -> Path:
    """Write the whole file set into a folder and return it."""
    out.mkdir(parents=True, exist_ok=True)
    write_documents(out, choices)
    weights = build_weights(choices.sizes)
    if choices.with_position_ids:
        count = choices.sizes.num_clip_positions
        weights["model.vision_model.embeddings.position_ids"] = torch.arange(count)[None]
    save_file(weights, out / WEIGHTS_FILE, {"format": "pt"})
    size_bytes = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict.fromkeys(sorted(weights), WEIGHTS_FILE)}
    _write(out, {INDEX_FILE: index})
    return out


def write_documents(out: Path, choices: Choices = Choices()) -> Path:
    """Write everything but the weights: what router, tokenizer and processor read."""
    out.mkdir(parents=True, exist_ok=True)
    settings = build_image_settings()
    files = {"config.json": build_config(choices.sizes), **dict.fromkeys(choices.image_files, settings)}
    _write(out, {**files, **build_tokenizer_files(choices)})
    return out


def _write(out: Path, documents: Mapping[str, Mapping[str, Any]]) -> None:
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def every_file_set() -> Iterable[tuple[str, ...]]:
    """Return each choice of files with image settings that a checkpoint may come with."""
    return ((PROCESSOR_FILE,), (PREPROCESSOR_FILE,), (PREPROCESSOR_FILE, PROCESSOR_FILE), ())


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    full: Annotated[bool, typer.Option("--full", help="All layers and tokens: 6.7 GB, random all the same.")] = False,
) -> None:
    """Write a checkpoint with the published file set, names and widths, and random weights."""
    typer.echo(write_stand_in(out, Choices(sizes=PUBLISHED if full else SMALL)))


if __name__ == "__main__":
    typer.run(main)
