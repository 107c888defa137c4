"""Turn a training run into the files that ship: `python -m serving.nano.training.export --run DIR`."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from serving.nano.pages import CORE, RenderedPage, sample_page, with_chars

HERE = Path(__file__).parents[1]
SAMPLE_SEED = 2026
SAMPLE_INDEX = 6


def sample() -> RenderedPage:
    """Return the page that documentation and first requests show; it is held out of training."""
    return sample_page(with_chars(CORE, 150, 300), "test", SAMPLE_SEED, SAMPLE_INDEX)


def export_weights(
    run: Path, out: Path, other: Path | None = None, share: float = 1.0, *, is_last: bool = False
) -> str:
    """Write the run's weights to `out` in float16 under their published names and return the file's SHA-256.

    They are the running mean of its steps, or those of the last step with `is_last` or when the run kept no mean.
    With `other`, weights that the run started from, the mean of both is written, in which the run has `share`:
    a short run's own mistakes, and those of what it started from, mostly cancel.
    """
    import torch
    from safetensors.torch import load_file, save

    saved = torch.load(run / "training.pt", weights_only=True)
    state = saved["model"]
    if "average" in saved and not is_last:
        state = {name: saved["average"][f"module.{name}"] for name in state}
    if other is not None:
        start = load_file(other)
        state = {name: torch.lerp(start[name].float(), weight, share) for name, weight in state.items()}
    data = save({name: state[name].half().contiguous() for name in sorted(state)})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def export_sample(folder: Path) -> None:
    """Write `sample.png` and the text on it, `sample.txt`."""
    from PIL import Image

    page = sample()
    Image.fromarray(page.pixels).save(folder / "sample.png", optimize=True)
    (folder / "sample.txt").write_text(page.text + "\n")


def main(
    run: Annotated[Path, typer.Option(help="Directory of the training run.")],
    other: Annotated[Path | None, typer.Option(help="Weights to take the mean with, those it started from.")] = None,
    share: Annotated[float, typer.Option(help="The run's share in that mean.", min=0.0, max=1.0)] = 0.5,
    out: Annotated[Path, typer.Option(help="The weights file.")] = HERE / "weights" / "nano.safetensors",
    last: Annotated[bool, typer.Option("--last", help="The last step's weights, not their running mean.")] = False,
) -> None:
    """Write weights, by default those that the package ships, and the package's sample page."""
    typer.echo(export_weights(run, out, other, share, is_last=last))
    export_sample(HERE)


if __name__ == "__main__":
    typer.run(main)
