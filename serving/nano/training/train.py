"""Train the nano that reads free print, on the CPU: `python -m serving.nano.training.train --out DIR`.

Pages are rendered on the way, so there is no data set. The run can be stopped at any time (Ctrl-C or SIGTERM) and goes
on from what it left in its directory; with `--resume FILE` a new run goes on from a small state of another one. The
budget and the log's time axis are CPU time, so that a run that is paused or shares its core loses nothing. The shipped
checkpoint comes from an older recipe and is not touched.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from serving.nano.config import FREE_PRINT, NanoConfig
from serving.nano.training.batches import OCR_PROMPT, SPACE, Batch
from serving.nano.training.families import TokenFamilies, place_code
from serving.nano.training.fonts import check_fonts
from serving.nano.training.guides import (
    PLACED_AFTER,
    PlaceGuides,
    Places,
    attention_losses,
    code_loss,
    overwrite_places,
    place_losses,
    router_loss,
    spoil,
    text_losses,
)
from serving.nano.training.held_out import SETS, HeldOut, error_rate, read_out
from serving.nano.training.initial import start_reading, start_weights
from serving.nano.training.model import NanoOcr
from serving.nano.training.plan import Clock, Plan, Stage, rate_share
from serving.nano.training.print_pages import sample_print
from serving.nano.training.readout import Readouts, encoder_losses
from serving.nano.training.state import load_whole, save_small, save_whole, unpack

WHOLE_NAME = "training.pt"
_ACCURACIES = ("read", "seen", "placed", "told", "own", "attended")


class Trainer:
    """Model, read-outs and optimiser, with the step that improves them."""

    def __init__(self, plan: Plan, clock: Clock, sizes: NanoConfig = FREE_PRINT) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.clock, self.sizes = plan, clock, sizes
        self.stage = Stage.ENCODER
        self.started_at = 0
        """Step at which the optimiser last started anew."""
        self.joint_at = 0.0
        """Progress at which all began to be trained together."""
        self.told = 0.0
        """Running mean of the characters that the decoder gets right where it is told the place."""
        self.model = NanoOcr(sizes)
        self.readouts = Readouts(sizes)
        self.families = TokenFamilies(sizes)
        self.guides = PlaceGuides(sizes)
        start_weights(self.model, self.batch(0, is_dense=True).pages)
        parts = {"model": self.model, "readouts": self.readouts, "families": self.families, "guides": self.guides}
        self.modules = nn.ModuleDict(parts)
        self.named = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.modules.named_parameters()}
        groups = [
            {"params": [p for p in self.named.values() if p.dim() > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in self.named.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, plan.rate, betas=(0.9, 0.98), fused=True)

    def batch(self, step: int, *, is_dense: bool) -> Batch:
        """Return the pages of a step, which is all that they depend on."""
        count = self.plan.encoder_pages if is_dense else self.plan.batch_pages
        spec = self.plan.spec(step, is_dense=is_dense)
        first = step * max(self.plan.batch_pages, self.plan.encoder_pages)
        pages = [sample_print(spec, "train", self.plan.seed, first + i) for i in range(count)]
        return Batch.from_pages(pages, np.random.default_rng((self.plan.seed, step)))

    def step(self) -> dict[str, float]:
        """Take one optimiser step and return the loss terms and accuracies."""
        share = rate_share(self.plan, self.clock.step - self.started_at, self.clock.progress)
        rate = share * (self.plan.encoder_rate if self.stage is Stage.ENCODER else self.plan.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _quickest_precision():
            terms = self._terms()
        loss = torch.stack([value for name, value in terms.items() if name not in _ACCURACIES]).sum()
        loss.backward()
        trained = [p for p in self.named.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.plan.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.clock.step += 1
        values = {name: round(float(value.detach()), 4) for name, value in terms.items()}
        if "told" in values:
            self.told += 0.02 * (values["told"] - self.told)
        return values | {"loss": round(float(loss.detach()), 4), "norm": round(float(norm), 3), "rate": round(rate, 6)}

    def _terms(self) -> dict[str, Tensor]:
        """Return the terms of a step, by the stage that the run is at."""
        is_encoders = self.stage is Stage.ENCODER or (
            self.stage is Stage.ALTERNATING and self.clock.step % self.plan.encoder_every == 0
        )
        batch = self.batch(self.clock.step, is_dense=is_encoders)
        if is_encoders:
            return encoder_losses(self.model.encode(batch.pages), self.readouts, batch, self.plan.encoder)
        is_joint = self.stage is Stage.JOINT
        with torch.set_grad_enabled(is_joint):
            patches, compressed = self.model.model.sam_model(self.model.pixels_of(batch.pages))
        encoded = self.model.project(patches, compressed)
        terms = encoder_losses(encoded, self.readouts, batch, self.plan.encoder, with_patches=is_joint)
        return terms | self._text_terms(encoded.cells, batch)

    def _told_share(self) -> float:
        if self.stage is not Stage.JOINT:
            return self.plan.told_share
        return self.plan.told_share * max(0.0, 1 - (self.clock.progress - self.joint_at) / self.plan.told_fades)

    def _text_terms(self, cells: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the decoder's terms; `told` and `own` are the printed characters it gets right, told or by itself."""
        weights, model, trunk = self.plan.decoder, self.model, self.model.model
        image = model.embed_prompt(cells, OCR_PROMPT)
        rows = self.families.inputs(trunk.embed_tokens.weight)
        text = F.embedding(spoil(batch.ids[:, :-1], weights), rows)
        start = image.shape[1] - 1
        places = Places.of(batch, self.sizes)
        is_told = torch.rand(len(batch.pages)) < self._told_share()
        code = place_code(places.at)

        def tell(layer: int, residual: Tensor) -> Tensor:
            return overwrite_places(residual, code, is_told, start) if layer == PLACED_AFTER else residual

        trace = model.decode(torch.cat([image, text], 1), tell)
        outputs = self.families.outputs(model.lm_head.weight)
        loss, right = text_losses(F.linear(trace.hidden[:, start:], outputs), batch, weights)
        early = F.linear(trunk.norm(trace.residuals[-2][:, start:]), outputs)
        attention, reading = attention_losses(trace, places, batch, start)
        is_print = batch.is_text & (batch.classes < SPACE)
        found = {"attended": reading}
        for name, is_group in (("told", is_told), ("own", ~is_told)):
            if bool(is_group.any()):
                found[name] = (right & is_print)[is_group].sum() / is_print[is_group].sum()
        return found | {
            "text": loss,
            "early": weights.early * text_losses(early, batch, weights)[0],
            "whereabouts": weights.places * place_losses(trace, self.guides, places, batch, start),
            "code": weights.code * code_loss(trace, places, batch, start),
            "attention": weights.attention * attention,
            "router": weights.router * router_loss(trace, places, batch, start),
        }

    def advance(self, read_a: float | None = None) -> None:
        """Go to the next stage if this one is done; `read_a` is the read-out on set A, where it was measured."""
        plan, progress = self.plan, self.clock.progress
        is_read = read_a is not None and read_a >= plan.encoder_until
        if self.stage is Stage.ENCODER and (is_read or progress >= plan.encoder_share):
            maps = self.readouts.cell_patches.weight.detach().view(16, -1, self.sizes.hidden_size)
            start_reading(self.model, maps, self.readouts.cell_slots.weight.detach())
            self._load_average_of(self.model.model.layers[-2:])
            self.stage, self.started_at = Stage.ALTERNATING, self.clock.step
        elif self.stage is Stage.ALTERNATING and (self.told >= plan.joint_from or progress >= plan.joint_share):
            self.stage, self.joint_at = Stage.JOINT, progress

    def _load_average_of(self, module: nn.Module) -> None:
        """Let the running mean of a module's weights start from what they are."""
        own = {id(p) for p in module.parameters()}
        self.average |= {name: p.detach().clone() for name, p in self.named.items() if id(p) in own}

    @torch.no_grad()
    def _update_average(self) -> None:
        since = self.clock.step - self.started_at
        decay = min(self.plan.average_decay, (1 + since) / (10 + since))
        mean = list(self.average.values())
        torch._foreach_lerp_(mean, [p.detach() for p in self.modules.parameters()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the running mean of its weights for a while, as a checkpoint has them."""
        kept = {name: p.detach().clone() for name, p in self.modules.named_parameters()}
        self._load(self.average)
        self.fold()
        try:
            yield
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.modules.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])

    @torch.no_grad()
    def fold(self) -> None:
        """Write the sums of the tokens' families into the model's rows, which is where a checkpoint has them."""
        embedding, output = self.model.model.embed_tokens.weight, self.model.lm_head.weight
        embedding.copy_(self.families.inputs(embedding))
        output.copy_(self.families.outputs(output))

    def state(self) -> dict[str, Any]:
        """Return everything that going on needs."""
        names = {parameter: name for name, parameter in self.named.items()}
        moments = {names[p]: dict(values) for p, values in self.optimizer.state.items()}
        return {
            "weights": {name: p.detach() for name, p in self.modules.named_parameters()},
            "average": self.average,
            "moments": moments,
            "random": torch.get_rng_state(),
            "about": self.about(),
        }

    def about(self) -> dict[str, Any]:
        """Return where the run is."""
        return {
            "step": self.clock.step,
            "seconds": self.clock.seconds,
            "stage": str(self.stage),
            "started_at": self.started_at,
            "joint_at": self.joint_at,
            "told": self.told,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; weights that it does not know stay as they start."""
        self._load(state["weights"])
        self.average |= {name: mean for name, mean in state["average"].items() if name in self.average}
        for name, moments in state["moments"].items():
            if name in self.named:
                self.optimizer.state[self.named[name]] = moments
        torch.set_rng_state(state["random"])
        self._go_to(state["about"])

    def resume(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Go on from a small state: weights alone, the optimiser starts anew."""
        self._load(tensors)
        self.average |= {name: tensor.clone() for name, tensor in tensors.items() if name in self.average}
        self._go_to(about)
        self.started_at = self.clock.step

    def _go_to(self, about: dict[str, Any]) -> None:
        self.clock.step, self.clock.seconds = about["step"], about["seconds"]
        self.stage, self.started_at = Stage(about["stage"]), about["started_at"]
        self.joint_at, self.told = about["joint_at"], about["told"]


_BFLOAT16_FLAGS = frozenset({"amx_bf16"})


def _quickest_precision() -> torch.autocast:
    """Return bfloat16 where the processor has AMX for it, float32 elsewhere, where it is slower or emulated."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not _BFLOAT16_FLAGS.isdisjoint(_processor_flags()))


@cache
def _processor_flags() -> frozenset[str]:
    """Return what Linux says that the processor can do; nothing on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.split())


def _measure(trainer: Trainer, held_out: list[HeldOut]) -> dict[str, float]:
    """Return for every set, in percent, the read-outs of vision tokens and of patches and, once it reads, the CER."""
    found: dict[str, float] = {}
    with trainer.averaged(), _quickest_precision():
        for one in held_out:
            cells, patches = read_out(trainer.model, trainer.readouts, one)
            found |= {one.name: round(100 * cells, 1), f"{one.name} patches": round(100 * patches, 1)}
            if trainer.stage is not Stage.ENCODER:
                found[f"{one.name} CER"] = round(100 * error_rate(trainer.model, one), 1)
    return found


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that a first Ctrl-C or SIGTERM is put into; a second Ctrl-C interrupts as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Rhythm:
    """How often to log (steps), and to measure and save (seconds of CPU time); pages of every held-out set."""

    log_steps: int = 10
    measure_s: float = 240.0
    save_s: float = 120.0
    small_s: float = 1200.0
    keep_small: int = 5
    measured_pages: int = 16


def run_training(
    out: Path, plan: Plan, clock: Clock, rhythm: Rhythm, sizes: NanoConfig = FREE_PRINT, resume: Path | None = None
) -> Trainer:
    """Train until the budget is used up or a signal comes, going on from `out` when it holds a state.

    A run without one starts from the small state `resume` when it is given.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, clock, sizes)
    if (out / WHOLE_NAME).exists():
        trainer.restore(load_whole(out / WHOLE_NAME))
    elif resume is not None:
        trainer.resume(*unpack(resume.read_bytes()))
    held_out = [HeldOut.draw(name, rhythm.measured_pages, plan.pages.side_px) for name in SETS]
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:.1f}%"))
    with (
        _stop_signals() as signals,
        (out / "log.jsonl").open("a", buffering=1) as log,
        Progress(*columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), refresh_per_second=0.2) as bar,
    ):
        task = bar.add_task("", total=1.0, step=clock.step, note="")
        saved = measured = small = clock.seconds

        def write(values: dict[str, Any]) -> None:
            where = {"step": clock.step, "core_minutes": round(clock.seconds / 60, 2), "stage": str(trainer.stage)}
            log.write(json.dumps(where | values) + "\n")

        while clock.progress < 1 and not signals:
            began = time.process_time()
            values = trainer.step()
            clock.seconds += time.process_time() - began
            if clock.step % rhythm.log_steps == 0:
                write(values)
            if clock.seconds - measured >= rhythm.measure_s or clock.progress >= 1:
                measured = clock.seconds
                found = _measure(trainer, held_out)
                write(found)
                trainer.advance(found["A"] / 100)
            if clock.seconds - saved >= rhythm.save_s:
                saved = clock.seconds
                save_whole(trainer.state(), out / WHOLE_NAME)
            if clock.seconds - small >= rhythm.small_s:
                small = clock.seconds
                save_small(trainer.average, trainer.about(), out, rhythm.keep_small)
            note = f"{trainer.stage} loss {values['loss']:.3f}"
            bar.update(task, completed=min(1.0, clock.progress), step=clock.step, note=note)
        save_whole(trainer.state(), out / WHOLE_NAME)
        save_small(trainer.average, trainer.about(), out, rhythm.keep_small)
    return trainer


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run: states and log.")] = Path("data/nano-training"),
    hours: Annotated[float, typer.Option(help="Budget of CPU time.")] = 25.0,
    steps: Annotated[int, typer.Option(help="Budget of optimiser steps.")] = 10_000_000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the pages.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="A small state that a new run goes on from.")] = None,
) -> None:
    """Train the nano that reads free print."""
    check_fonts()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    run_training(out, replace(Plan(), seed=seed), Clock(steps, hours * 3600), Rhythm(), resume=resume)


if __name__ == "__main__":
    typer.run(main)
