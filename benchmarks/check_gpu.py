"""`python -m benchmarks.check_gpu`: what only a GPU can settle about the published checkpoint, in a few minutes.

Each step is a row of the table: driver and versions, the checkpoint's files and token ids, every parameter loaded, each
resolution mode against the encoder written from the paper, no synchronisation of host and device, the guard against its
rule with its time a step, and a step full of pages within the memory. The exit status is 1 if a step failed.
`--dry-run` runs all of this code on the processor with a stand-in checkpoint. What needs whole engines - throughput by
concurrency, a killed engine, a second start - is `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.documents import RESULTS
from benchmarks.stand_in import PUBLISHED, SMALL, WEIGHTS_FILE, Choices, write_stand_in
from serving.nano.config import NanoConfig
from serving.plugin.modes.selection import MODES

OLDEST_DRIVER = 580
"""CUDA 13 needs it; the set-up checks the same (`requirements/install.py`)."""
_GREY = (127, 127, 127)
_SIZE, _WINDOW, _ROWS = 30, 90, 256
"""The guard's rule and the batch that it is timed with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found."""

    step: str
    is_good: bool
    detail: str
    took_s: float


@dataclass(slots=True)
class Bench:
    """What the steps share."""

    checkpoint: Path
    sizes: NanoConfig
    device: torch.device
    dtype: str
    is_dry: bool
    model: Any = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def modes(self) -> tuple[str, ...]:
        """On a processor only the smallest one: the largest takes minutes."""
        return ("tiny",) if self.is_dry else tuple(MODES)


class CheckError(Exception):
    """A step found something wrong."""


def check_machine(bench: Bench) -> str:
    """Driver, CUDA and Triton."""
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {find_triton()}"
    if bench.is_dry:
        return versions
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    check_driver(told[0].rpartition(",")[2].strip())
    return f"{len(told)} x {told[0]}; {versions}"


def check_driver(version: str) -> None:
    """Raise CheckError if a driver of this version is too old."""
    if int(version.partition(".")[0]) < OLDEST_DRIVER:
        raise CheckError(f"the driver {version} is older than {OLDEST_DRIVER}, which CUDA 13 needs")


def find_triton() -> str:
    """Triton's version, `none` without it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def check_files(bench: Bench) -> str:
    """Files of the checkpoint; ids and flags of the tokens that recipes name."""
    names = sorted(file.name for file in bench.checkpoint.iterdir())
    tokenizer = json.loads((bench.checkpoint / "tokenizer.json").read_text())
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    told = []
    for name in ("<image>", "<td>", "</td>"):
        if name not in added:
            raise CheckError(f"the tokenizer has no token {name}; files: {', '.join(names)}")
        told.append(f"{name} {added[name]['id']}{' special' if added[name]['special'] else ''}")
    return f"{', '.join(told)}; {', '.join(names)}"


def check_parameters(bench: Bench) -> str:
    """Load the model as an engine does."""
    from benchmarks.loading import load_model

    loaded = load_model(bench.checkpoint, bench.dtype, bench.device)
    if loaded.blank:
        raise CheckError(f"not in the file: {', '.join(loaded.blank[:5])}")
    bench.model = loaded.model
    return f"{loaded.num_values:,} values in {bench.dtype}"


def check_modes(bench: Bench) -> str:
    """The features of a page in each mode against the reference."""
    from benchmarks.reference_encoder import ReferenceEncoder, relative_error

    reference = ReferenceEncoder(bench.checkpoint / WEIGHTS_FILE, bench.sizes, device=bench.device)
    bound = 2e-6 if bench.dtype == "float32" else 2e-2
    errors = {}
    for mode in bench.modes:
        given = build_pages(mode, 1, bench.device)
        with torch.inference_mode():
            (found,) = bench.model.embed_multimodal(**given)
            grid = (int(given["images_spatial_crop"][0][0]), int(given["images_spatial_crop"][0][1]))
            wanted = reference.encode_page(given["pixel_values"][0], given["images_crop"][0], grid)
        errors[mode] = relative_error(found, wanted)
    told = ", ".join(f"{mode} {error:.1e}" for mode, error in errors.items())
    if max(errors.values()) >= bound:
        raise CheckError(f"more than {bound:.0e} of the features' length: {told}")
    return told


def check_waits(bench: Bench) -> str:
    """Encode again what was encoded before, while the device refuses to let the host wait."""
    given = build_pages(bench.modes[-1], 2, bench.device)
    with torch.inference_mode():
        bench.model.embed_multimodal(**given)  # what is sent once
        with refuse_synchronising(bench.device):
            bench.model.embed_multimodal(**given)
    return f"two pages in {bench.modes[-1]}"


@contextlib.contextmanager
def refuse_synchronising(device: torch.device) -> Iterator[None]:
    """Make every operation that lets the host wait for the device an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_guard(bench: Bench) -> str:
    """The guard's bans on the device against the rule on the host, and the time of a step."""
    from serving.plugin.repetition.ngram_bans import NGramBans
    from serving.plugin.repetition.ngram_guard import ban_repeats

    generator = np.random.default_rng(7)
    rules = torch.tensor([[_SIZE, _WINDOW]], device=bench.device).expand(_ROWS, 2)
    white = torch.tensor([[5, 6]], device=bench.device).expand(_ROWS, 2)
    width, steps_s = _SIZE + _WINDOW, list[float]()
    for _ in range(1 if bench.is_dry else 200):
        # Few letters and long cycles, so that most rows have something to ban.
        cycles = [generator.integers(0, 9, generator.integers(1, 50)) for _ in range(_ROWS)]
        outputs = [np.resize(cycle, generator.integers(width, 400)).tolist() for cycle in cycles]
        bans = NGramBans(512)
        seats = np.array([bans.open(_SIZE, _WINDOW, frozenset((5, 6))) for _ in outputs])
        which, tokens = bans.advance(seats, outputs)
        wanted = torch.zeros((_ROWS, 64), dtype=torch.bool)
        wanted[torch.from_numpy(which.copy()), torch.from_numpy(tokens.copy())] = True
        tail = torch.tensor([output[-width:] for output in outputs], dtype=torch.int32, device=bench.device)
        lengths = torch.tensor([len(output) for output in outputs], device=bench.device)
        logits = torch.zeros((_ROWS, 64), device=bench.device)
        began_s = time.perf_counter()
        ban_repeats(logits, tail, lengths, rules, white, _SIZE)
        found = torch.isinf(logits).cpu()
        steps_s.append(time.perf_counter() - began_s)
        if not torch.equal(found, wanted):
            raise CheckError(f"{int((found != wanted).sum())} bans differ from the rule's")
    return f"{len(steps_s)} batches of {_ROWS} equal, {1000 * float(np.median(steps_s)):.2f} ms a step"


def check_memory(bench: Bench) -> str:
    """As many pages as enter one step."""
    mode, count = bench.modes[-1], 2 if bench.is_dry else 17
    given = build_pages(mode, count, bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    with torch.inference_mode():
        features = bench.model.embed_multimodal(**given)
    if any(bool(page.isnan().any()) for page in features):
        raise CheckError("some features are no numbers")
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**30 if bench.device.type == "cuda" else None
    return f"{count} pages in {mode}" + ("" if peak is None else f", {peak:.1f} GiB at most")


def build_pages(mode: str, count: int, device: torch.device) -> dict[str, Any]:
    """Pages of blocks in random colours, as the processor gives them to the model."""
    from serving.plugin.images.page_views import build_views

    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 256, (146, 103, 3), dtype=np.uint8)
    page = Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1)).crop((0, 0, 1648, 2336))
    views = build_views(page, MODES[mode], _GREY)
    return {
        "pixel_values": views.global_view.to(device).expand(count, -1, -1, -1),
        "images_crop": [views.tiles.to(device)] * count,
        "images_spatial_crop": torch.tensor([[views.grid.columns, views.grid.rows]] * count),
    }


STEPS: dict[str, Callable[[Bench], str]] = {
    "machine": check_machine,
    "files": check_files,
    "guard": check_guard,
    "parameters": check_parameters,
    "modes": check_modes,
    "no waiting": check_waits,
    "memory": check_memory,
}


def run_steps(bench: Bench, steps: dict[str, Callable[[Bench], str]] = STEPS) -> None:
    """Run every step, whatever became of those before; an error of any kind is its step's."""
    for name, step in steps.items():
        began_s = time.monotonic()
        try:
            is_good, detail = True, step(bench)
        except CheckError as error:
            is_good, detail = False, str(error)
        except Exception as error:  # noqa: BLE001 - the table must tell of the others as well
            traceback.print_exc()
            is_good, detail = False, f"{type(error).__name__}: {error}"
        bench.outcomes.append(Outcome(name, is_good, detail, round(time.monotonic() - began_s, 2)))


def find_checkpoint(name: str, revision: str) -> Path:
    """The folder of a checkpoint: itself, or that of a repository that `hf download` has fetched."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, local_files_only=True))


def main(
    checkpoint: Annotated[str, typer.Option(help="A folder, or a repository that was downloaded.")] = (
        "deepseek-ai/DeepSeek-OCR"
    ),
    revision: Annotated[str, typer.Option(help="Its commit.")] = "9f30c71f441d010e5429c532364a86705536c53a",
    json_file: Annotated[Path, typer.Option("--json", help="The same as JSON.")] = RESULTS / "check_gpu.json",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the processor, with a stand-in.")] = False,
) -> None:
    """Check on a GPU what could not be checked without one."""
    from benchmarks.loading import one_process_world

    if not dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here; --dry-run runs the same code without one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if dry_run:
            made = write_stand_in(folder / "checkpoint", Choices())
            bench = Bench(made, SMALL, torch.device("cpu"), "float32", is_dry=True)
        else:
            found = find_checkpoint(checkpoint, revision)
            bench = Bench(found, PUBLISHED, torch.device("cuda:0"), "bfloat16", is_dry=False)
        with one_process_world(folder):
            run_steps(bench)
    table = Table("step", "", "found", "s")
    for outcome in bench.outcomes:
        table.add_row(outcome.step, "ok" if outcome.is_good else "FAILED", outcome.detail, f"{outcome.took_s:.1f}")
    Console(width=160).print(table)
    is_good = all(outcome.is_good for outcome in bench.outcomes)
    steps = [asdict(outcome) for outcome in bench.outcomes]
    json_file.write_text(json.dumps({"is_good": is_good, "is_dry": dry_run, "steps": steps}, indent=1) + "\n")
    raise typer.Exit(0 if is_good else 1)


if __name__ == "__main__":
    typer.run(main)
