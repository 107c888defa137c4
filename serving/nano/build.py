"""Write the nano checkpoint in the published DeepSeek-OCR format: `python -m serving.nano.build`.

Only NumPy and safetensors are needed, so the command takes about a second. The same sources give the same bytes.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from safetensors.numpy import load, save

from serving.nano.config import NANO, NanoConfig, build_model_config, build_processor_config
from serving.nano.tokenizer import build_special_tokens_map, build_tokenizer_config, build_tokenizer_json

DEFAULT_DIR = Path("checkpoints/nano")
STAMP_NAME = ".stamp.json"

Float32Array = NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]


def _attention_block(prefix: str, width: int, names: tuple[str, str, str, str]) -> Shapes:
    """Shapes of a pre-norm encoder block; `names` are its qkv, output, first and second MLP layers."""
    qkv, out, first, second = names
    return {
        f"{prefix}.{qkv}.weight": (3 * width, width),
        f"{prefix}.{qkv}.bias": (3 * width,),
        f"{prefix}.{out}.weight": (width, width),
        f"{prefix}.{out}.bias": (width,),
        f"{prefix}.{first}.weight": (4 * width, width),
        f"{prefix}.{first}.bias": (4 * width,),
        f"{prefix}.{second}.weight": (width, 4 * width),
        f"{prefix}.{second}.bias": (width,),
    }


def _norm(prefix: str, width: int) -> Shapes:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def _sam_shapes(sizes: NanoConfig) -> Shapes:
    width, side, neck = sizes.sam_width, sizes.sam_side, sizes.neck_channels
    first, second = sizes.downsample_channels
    shapes: Shapes = {
        "pos_embed": (1, side, side, width),
        "patch_embed.proj.weight": (width, 3, sizes.patch_size, sizes.patch_size),
        "patch_embed.proj.bias": (width,),
    }
    for layer in range(sizes.sam_layers):
        prefix = f"blocks.{layer}"
        span = 2 * (side if layer in sizes.sam_global_layers else sizes.sam_window) - 1
        shapes |= _norm(f"{prefix}.norm1", width) | _norm(f"{prefix}.norm2", width)
        shapes |= _attention_block(prefix, width, ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"))
        shapes |= {f"{prefix}.attn.rel_pos_{axis}": (span, width // sizes.sam_heads) for axis in "hw"}
    shapes |= {"neck.0.weight": (neck, width, 1, 1), "neck.2.weight": (neck, neck, 3, 3)}
    shapes |= _norm("neck.1", neck) | _norm("neck.3", neck)
    return shapes | {"net_2.weight": (first, neck, 3, 3), "net_3.weight": (second, first, 3, 3)}


def _clip_shapes(sizes: NanoConfig) -> Shapes:
    width, patch = sizes.clip_width, sizes.clip_patch_size
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        # Never run: the compressed SAM features take the place of CLIP's own patches. The published file has it too.
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (sizes.num_clip_positions, width),
    }
    shapes |= _norm("pre_layrnorm", width)
    for layer in range(sizes.clip_layers):
        prefix = f"transformer.layers.{layer}"
        shapes |= _norm(f"{prefix}.layer_norm1", width) | _norm(f"{prefix}.layer_norm2", width)
        names = ("self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
        shapes |= _attention_block(prefix, width, names)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _decoder_layer_shapes(sizes: NanoConfig, layer: int) -> Shapes:
    hidden, prefix = sizes.hidden_size, f"model.layers.{layer}"
    shapes: Shapes = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
    shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    if layer < sizes.num_dense_layers:
        return shapes | _mlp_shapes(f"{prefix}.mlp", hidden, sizes.dense_size)
    shapes[f"{prefix}.mlp.gate.weight"] = (sizes.num_experts, hidden)
    for expert in range(sizes.num_experts):
        shapes |= _mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, sizes.expert_size)
    shared_size = sizes.expert_size * sizes.num_shared_experts
    return shapes | _mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, shared_size)


def weight_shapes(sizes: NanoConfig = NANO) -> Shapes:
    """Return the shape of every tensor of the checkpoint, under its published name."""
    hidden = sizes.hidden_size
    shapes: Shapes = {
        "lm_head.weight": (sizes.vocab_size, hidden),
        "model.embed_tokens.weight": (sizes.vocab_size, hidden),
        "model.image_newline": (hidden,),
        "model.norm.weight": (hidden,),
        "model.projector.layers.bias": (hidden,),
        "model.projector.layers.weight": (hidden, sizes.clip_width + sizes.downsample_channels[1]),
        "model.view_seperator": (hidden,),  # the published name has the typo
    }
    shapes |= {f"model.sam_model.{name}": shape for name, shape in _sam_shapes(sizes).items()}
    shapes |= {f"model.vision_model.{name}": shape for name, shape in _clip_shapes(sizes).items()}
    for layer in range(sizes.num_layers):
        shapes |= _decoder_layer_shapes(sizes, layer)
    return shapes


def build_random_weights(sizes: NanoConfig = NANO) -> dict[str, Float32Array]:
    """Return float32 weights drawn from a seed of their own per tensor: norms at one, biases at zero."""
    weights: dict[str, Float32Array] = {}
    for name, shape in weight_shapes(sizes).items():
        if name.endswith(".bias"):
            weights[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1 and name.endswith(".weight"):
            weights[name] = np.ones(shape, np.float32)
        else:
            generator = np.random.default_rng(zlib.crc32(name.encode()))
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
            weights[name] = generator.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)
    return weights


def read_trained_weights() -> bytes | None:
    """Return the shipped weights file (float16), or None when there is none."""
    file = resources.files("serving.nano") / "weights" / "nano.safetensors"
    return file.read_bytes() if file.is_file() else None


def config_files(sizes: NanoConfig, tokenizer: Mapping[str, Any]) -> dict[str, bytes]:
    """Return every file of a checkpoint but the weights, `tokenizer` being its `tokenizer.json`."""
    documents: dict[str, Mapping[str, Any]] = {
        "config.json": build_model_config(sizes) | {"torch_dtype": "float32", "transformers_version": "4.46.3"},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        "preprocessor_config.json": build_processor_config(sizes),
        "processor_config.json": build_processor_config(sizes),
        "special_tokens_map.json": build_special_tokens_map(),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": build_tokenizer_config(sizes.max_positions),
    }
    return {
        name: (json.dumps(document, indent=2, ensure_ascii=False, sort_keys=name != "tokenizer.json") + "\n").encode()
        for name, document in documents.items()
    }


def _model_file(trained: bytes | None) -> bytes:
    """Return `model.safetensors` in float32, with every tensor checked against the sizes."""
    shapes = weight_shapes()
    weights = build_random_weights() if trained is None else load(trained)
    found = {name: weight.shape for name, weight in weights.items()}
    if found != shapes:
        wrong = sorted({*found.items()} ^ {*shapes.items()})
        raise ValueError(f"the trained weights do not fit the sizes in serving.nano.config: {wrong[:4]}")
    return save({name: weights[name].astype(np.float32) for name in sorted(weights)}, {"format": "pt"})


def _replace_file(path: Path, data: bytes) -> None:
    """Write `path` so that a reader sees the old bytes or the new ones, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _is_current(out: Path, source: str) -> bool:
    """Tell whether `out` was written from `source` (a digest) and still has every file at its size."""
    try:
        stamp = json.loads((out / STAMP_NAME).read_bytes())
        files: dict[str, int] = stamp["files"]
        return stamp["source"] == source and all((out / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest_parts(configs: Mapping[str, bytes], trained: bytes | None) -> Iterator[bytes]:
    for name, data in configs.items():
        yield name.encode()
        yield data
    yield trained if trained is not None else Path(__file__).read_bytes()


def build_checkpoint(out: Path, *, random: bool = False) -> Path:
    """Write the checkpoint into the directory `out` and return it; files that are up to date are left alone.

    The shipped trained weights are used when there are any, seeded random ones otherwise or when `random` is set.
    """
    trained = None if random else read_trained_weights()
    configs = config_files(NANO, build_tokenizer_json())
    digest = hashlib.sha256()
    for part in _digest_parts(configs, trained):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    source = digest.hexdigest()
    if _is_current(out, source):
        return out
    files = {**configs, "model.safetensors": _model_file(trained)}
    out.mkdir(parents=True, exist_ok=True)
    (out / STAMP_NAME).unlink(missing_ok=True)
    for name, data in files.items():
        _replace_file(out / name, data)
    stamp = {"source": source, "files": {name: len(data) for name, data in files.items()}}
    _replace_file(out / STAMP_NAME, json.dumps(stamp).encode())
    return out


def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = DEFAULT_DIR,
    random: Annotated[bool, typer.Option("--random", help="Ignore the shipped trained weights.")] = False,
) -> None:
    """Write the nano checkpoint in the published DeepSeek-OCR format."""
    typer.echo(build_checkpoint(out, random=random))


if __name__ == "__main__":
    typer.run(main)
