"""Turn a state of a training run into a checkpoint: `python -m serving.nano.training.export STATE --out DIR`.

The directory is in the published format, for `serving up` and for a plain `vllm serve`. Nothing that ships is touched:
the shipped weights come from an older recipe, and only its sample page, `sample()`, is still drawn here.
"""

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from serving.nano.build import config_files, weight_shapes
from serving.nano.config import FREE_PRINT, NanoConfig
from serving.nano.pages import CORE, RenderedPage, sample_page, with_chars
from serving.nano.print_tokens import build_tokenizer_json

SAMPLE_SEED = 2026
SAMPLE_INDEX = 6


def sample() -> RenderedPage:
    """Return the page that documentation and first requests show; it is held out of training."""
    return sample_page(with_chars(CORE, 150, 300), "test", SAMPLE_SEED, SAMPLE_INDEX)


def checkpoint_weights(tensors: dict[str, Tensor], sizes: NanoConfig = FREE_PRINT) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, under their published names, from the tensors of a run.

    Raises:
        ValueError: the tensors are not those of a run at these sizes.
    """
    from serving.nano.training.families import TokenFamilies

    families = TokenFamilies(sizes)
    prefix = "families."
    families.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    weights[embedding] = families.inputs(weights[embedding]).detach()
    weights[output] = families.outputs(weights[output]).detach()
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != weight_shapes(sizes):
        raise ValueError(
            f"the state is not of this model: {sorted({*found.items()} ^ {*weight_shapes(sizes).items()})[:4]}"
        )
    return weights


def export_checkpoint(state: Path, out: Path, sizes: NanoConfig = FREE_PRINT) -> str:
    """Write the running mean of a state's weights as a checkpoint and return the SHA-256 of its weights in float16.

    `state` is a whole state (`training.pt`) or a small one (`*.nano8`).
    """
    from safetensors.torch import save

    from serving.nano.training.state import load_whole, unpack

    tensors = load_whole(state)["average"] if state.suffix == ".pt" else unpack(state.read_bytes())[0]
    weights = {name: weight.half().contiguous() for name, weight in checkpoint_weights(tensors, sizes).items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in config_files(sizes, build_tokenizer_json()).items():
        (out / name).write_bytes(content)
    floats = {name: weights[name].float() for name in sorted(weights)}
    (out / "model.safetensors").write_bytes(save(floats, {"format": "pt"}))
    return hashlib.sha256(save({name: weights[name] for name in sorted(weights)})).hexdigest()


def main(
    state: Annotated[Path, typer.Argument(help="A state of a run: its `training.pt`, or a small one.")],
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.")] = Path("checkpoints/nano-print"),
) -> None:
    """Write a checkpoint from a state of a training run."""
    typer.echo(export_checkpoint(state, out))


if __name__ == "__main__":
    typer.run(main)
