"""Train the nano checkpoint on the CPU: `python -m serving.nano.training.train --out DIR`.

Pages are rendered on the way, so there is no data set. The run can be stopped at any time (Ctrl-C or SIGTERM) and goes
on from its own checkpoint. A budget in minutes counts only the time spent training. With `--from-weights FILE` a new
run starts from trained weights, without the state of their optimiser, and follows the recipe of a second stretch.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from serving.nano.config import NANO, NanoConfig
from serving.nano.pages import PageSpec, with_chars
from serving.nano.tokenizer import BOS_ID, EOS_ID, encode_text
from serving.nano.training.batches import OCR_PROMPT, Batch
from serving.nano.training.decoder import DecoderTrace
from serving.nano.training.initial import start_weights
from serving.nano.training.losses import (
    TrainingHeads,
    attention_loss,
    balance_loss,
    encoder_losses,
    place_loss,
    text_loss,
)
from serving.nano.training.measure import measure_pages
from serving.nano.training.model import NanoOcr, load_model
from serving.nano.training.plan import CONTINUED, Clock, Plan, learning_rate
from serving.nano.training.stream import BatchStream

_OTHER_EVERY = 10
"""Prompts without an image come once in so many steps."""
_OTHER_PROMPTS = ("", "\nFree OCR", "Free OCR.\n", "\nOCR this image.", "\nRead this page.", "\nWhat does this say?")


class Trainer:
    """Model, read-outs and optimiser, with the step that improves them."""

    def __init__(self, plan: Plan, clock: Clock, sizes: NanoConfig = NANO, weights: Path | None = None) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.clock = plan, clock
        self.model = NanoOcr(sizes)
        self.heads = TrainingHeads(sizes)
        start_weights(self.model)
        if weights is not None:
            self.model.load_state_dict(load_model(weights, sizes).state_dict())
        trainable = [p for module in (self.model, self.heads) for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, plan.peak_rate, betas=(0.9, 0.98), fused=True)
        self.parameters = trainable
        self.average: AveragedModel | None = None
        if plan.average_decay:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(plan.average_decay))

    @property
    def reader(self) -> NanoOcr:
        """The model to read with: the running mean of the weights when there is one."""
        return cast(NanoOcr, self.average.module) if self.average else self.model

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimiser step and return the loss terms and accuracies."""
        is_heads_only = self.clock.step < self.plan.heads_steps
        progress = self.clock.progress
        rate = self.plan.heads_rate if is_heads_only else learning_rate(self.plan, self.clock.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _quickest_precision():
            terms = self._head_terms(batch) if is_heads_only else self._terms(batch)
        loss = torch.stack([value for name, value in terms.items() if name not in _ACCURACIES]).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average and not is_heads_only:
            self.average.update_parameters(self.model)
        self.clock.step += 1
        values = {name: round(float(value.detach()), 4) for name, value in terms.items()}
        values["view"] = batch.pages.shape[-1]
        return values | {"loss": round(float(loss.detach()), 4), "norm": round(float(norm), 3), "rate": round(rate, 6)}

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of a step; past its own stage the encoder is trained in every `encoder_every`-th only."""
        progress = self.clock.progress
        if self.clock.step % self.plan.encoder_every and progress >= self.plan.encoder_until:
            with torch.no_grad():
                encoded = self.model.encode(batch.pages)
            terms = {}
        else:
            encoded = self.model.encode(batch.pages)
            terms = encoder_losses(encoded, self.heads, batch, self.plan.weights)
        if progress < self.plan.encoder_until:
            return terms
        terms |= self._text_terms(encoded.cells, batch)
        return terms if self.clock.step % _OTHER_EVERY else terms | {"other": self._other_loss()}

    def _head_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms that train the read-outs on the model as it is."""
        with torch.no_grad():
            encoded = self.model.encode(batch.pages)
            trace, start = self._decode_text(encoded.cells, batch)
        places = self.plan.weights.places * place_loss(trace, self.heads, batch, start)
        return encoder_losses(encoded, self.heads, batch, self.plan.weights) | {"places": places}

    def _decode_text(self, cells: Tensor, batch: Batch) -> tuple[DecoderTrace, int]:
        """Run the decoder over image, prompt and text; the second result is where the first character comes out."""
        image = self.model.embed_prompt(cells, self._sample_prompt())
        text = self.model.model.embed_tokens(self.mistake(batch.ids[:, :-1]))
        return self.model.decode(torch.cat([image, text], 1)), image.shape[1] - 1

    def mistake(self, ids: Tensor) -> Tensor:
        """Replace a share of the printed characters: the reader is to go on from its own mistakes as well."""
        if not self.plan.mistake_share:
            return ids
        is_print = (ids > _PRINTABLE_IDS[0]) & (ids < _PRINTABLE_IDS[1])
        is_wrong = is_print & (torch.rand(ids.shape) < self.plan.mistake_share)
        return torch.where(is_wrong, torch.randint(*_PRINTABLE_IDS, ids.shape), ids)

    def _text_terms(self, cells: Tensor, batch: Batch) -> dict[str, Tensor]:
        weights = self.plan.weights
        trace, start = self._decode_text(cells, batch)
        loss, right, turned = text_loss(self.model.lm_head(trace.hidden[:, start:]), batch, weights)
        balance = sum(balance_loss(logits) for logits in trace.router_logits)
        return {
            "text": weights.text * loss,
            "places": weights.places * place_loss(trace, self.heads, batch, start),
            "attention": weights.attention * attention_loss(trace, batch, start),
            "balance": weights.balance * balance,
            "right": right,
            "turned": turned,
        }

    def _sample_prompt(self) -> list[int]:
        pick = int(torch.randint(5 * len(_OTHER_PROMPTS), ()))
        return encode_text(_OTHER_PROMPTS[pick]) if pick < len(_OTHER_PROMPTS) else OCR_PROMPT

    def _other_loss(self) -> Tensor:
        """Return the loss of ending at once when there is no image: a few random printable texts of one length."""
        length = int(torch.randint(1, 40, ()))
        ids = torch.randint(*_PRINTABLE_IDS, (4, length))
        starts = torch.full((4, 1), BOS_ID)
        trace = self.model.decode(self.model.model.embed_tokens(torch.cat([starts, ids], 1)))
        ends = torch.full((4,), EOS_ID)
        return 0.1 * torch.nn.functional.cross_entropy(self.model.lm_head(trace.hidden[:, -1]).float(), ends)

    def state(self) -> dict[str, Any]:
        """Return everything that going on needs."""
        average = {"average": self.average.state_dict()} if self.average else {}
        return average | {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.clock.step,
            "seconds": self.clock.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        self.clock.step, self.clock.seconds = state["step"], state["seconds"]


_ACCURACIES = ("seen", "read", "right", "turned")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_PRINTABLE_IDS = (encode_text(" ")[0], encode_text("~")[0] + 1)


def _quickest_precision() -> torch.autocast:
    """Return bfloat16 where the processor multiplies it, float32 where that is emulated, many times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not _BFLOAT16_FLAGS.isdisjoint(_processor_flags()))


@cache
def _processor_flags() -> frozenset[str]:
    """Return what Linux says that the processor can do; nothing on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.split())


def _measure(model: NanoOcr, plan: Plan, num_pages: int) -> dict[str, float]:
    """Return the mean character error rate on held-out pages: core, wide, and core at the first other view."""
    cases: dict[str, tuple[PageSpec, int | None]] = {"cer_core": (plan.core, None), "cer_wide": (plan.wide, None)}
    if plan.views:
        cases["cer_view"] = plan.core, plan.views[0].side_px
    with torch.no_grad(), _quickest_precision():
        results = {
            name: measure_pages(model, with_chars(spec, *plan.measured_chars), num_pages, seed=1, view_px=view_px)
            for name, (spec, view_px) in cases.items()
        }
    return {name: round(sum(result.rate for result in pages) / num_pages, 4) for name, pages in results.items()}


def _save(state: dict[str, Any], file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, file)


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
    """How often to log, measure and save, in steps, seconds and seconds; pages per measurement."""

    log_steps: int = 10
    measure_s: float = 3600.0
    save_s: float = 120.0
    measured_pages: int = 16


def run_training(
    out: Path, plan: Plan, clock: Clock, rhythm: Rhythm, sizes: NanoConfig = NANO, weights: Path | None = None
) -> NanoOcr:
    """Train until the budget is used up or a signal comes, going on from `out` when it holds a checkpoint.

    A run without one starts from `weights` when they are given.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, clock, sizes, weights)
    checkpoint = out / "training.pt"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True))
    stream = BatchStream(plan, sizes, clock)
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:.1f}%"))
    with (
        _stop_signals() as signals,
        (out / "log.jsonl").open("a", buffering=1) as log,
        Progress(*columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), refresh_per_second=1) as bar,
    ):
        task = bar.add_task("", total=1.0, step=clock.step, note="")
        saved = measured = clock.seconds
        while clock.progress < 1 and not signals:
            began = time.monotonic()
            values = trainer.step(stream.batch(clock.step))
            clock.seconds += time.monotonic() - began
            if clock.step % rhythm.log_steps == 0:
                log.write(json.dumps({"step": clock.step, "seconds": round(clock.seconds), **values}) + "\n")
            if clock.seconds - measured >= rhythm.measure_s or clock.progress >= 1:
                measured = clock.seconds
                rates = _measure(trainer.reader, plan, rhythm.measured_pages)
                log.write(json.dumps({"step": clock.step, "seconds": round(clock.seconds), **rates}) + "\n")
            if clock.seconds - saved >= rhythm.save_s:
                saved = clock.seconds
                _save(trainer.state(), checkpoint)
            note = f"loss {values['loss']:.3f}"
            bar.update(task, completed=min(1.0, clock.progress), step=clock.step, note=note)
        _save(trainer.state(), checkpoint)
    stream.close()
    return trainer.reader


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run: checkpoint and log.")],
    minutes: Annotated[float, typer.Option(help="Budget of training time.")] = 120.0,
    steps: Annotated[int, typer.Option(help="Budget of optimiser steps.")] = 1_000_000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and the pages.")] = None,
    from_weights: Annotated[Path | None, typer.Option(help="Trained weights to start a new run from.")] = None,
) -> None:
    """Train the nano checkpoint on rendered pages."""
    torch.set_num_threads(threads)
    plan = CONTINUED if from_weights else Plan()
    plan = plan if seed is None else replace(plan, seed=seed)
    run_training(out, plan, Clock(steps, minutes * 60), Rhythm(), weights=from_weights)


if __name__ == "__main__":
    typer.run(main)
