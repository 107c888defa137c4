"""CPU time per generated token of the n-gram guard, through vLLM's interface for logits processors.

Each step does to a batch what vLLM's model runner does: append a token to every output, tell the processor, let it
apply. The floor is the same steps with a processor that does nothing. "text" is outputs without repeated n-grams, as
nearly all are; "loop" outputs that run round in a cycle, so that every row has a banned token at every step.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from benchmarks.fastpath.rows import Row, cpu_seconds
from benchmarks.stock import NAME, import_stock
from serving.plugin.repetition.ngram_guard import NGramGuard

VOCABULARY, MAX_LENGTH, WHITELIST = 129_280, 8192, (128_821, 128_822)
ARGUMENTS = {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": list(WHITELIST)}
BATCHES = (1, 32, 256)
_NUM_BEFORE = 200
"""Tokens that every output has when the clock starts: more than the window."""
_REPEATS = 5


class EmptyProcessor:
    """The floor."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@dataclass(frozen=True, slots=True)
class Workload:
    """streams: (sequences, tokens), what each sequence generates whatever the processor bans."""

    streams: np.ndarray[Any, np.dtype[np.int64]]
    logits: torch.Tensor

    def us_per_token(self, build: Callable[..., Any], num_steps: int) -> float:
        """CPU time per sequence and step, after all that is only done once."""
        processor = build(_engine_config(), torch.device("cpu"), False)
        outputs: list[list[int]] = [row[:_NUM_BEFORE].tolist() for row in self.streams]
        added = [(row, SamplingParams(extra_args=ARGUMENTS), [0], output) for row, output in enumerate(outputs)]
        processor.update_state(BatchUpdate(len(outputs), [], added, []))
        processor.apply(self.logits)
        columns = self.streams.T[_NUM_BEFORE : _NUM_BEFORE + num_steps].tolist()

        def generate() -> None:
            for column in columns:
                for output, token in zip(outputs, column, strict=True):
                    output.append(token)
                processor.update_state(None)
                processor.apply(self.logits)

        return cpu_seconds(generate) / num_steps / len(outputs) * 1e6


def _engine_config() -> Any:
    """As much of a `VllmConfig` as the processors read; without a tokenizer, whitelists are given as ids."""
    return types.SimpleNamespace(
        additional_config={"ngram_guard": {"whitelist": WHITELIST}},
        model_config=types.SimpleNamespace(
            max_model_len=MAX_LENGTH,
            skip_tokenizer_init=True,
            logits_processors=None,
            architecture="DeepseekOCRForCausalLM",
        ),
        scheduler_config=types.SimpleNamespace(async_scheduling=False),
        parallel_config=None,
    )


def _text(batch: int, num_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens as frequent as words are, every fourth a table cell's."""
    generator = np.random.default_rng(0)
    tokens = generator.zipf(1.2, (batch, num_tokens)) % VOCABULARY
    return np.where(generator.random(tokens.shape) < 0.25, generator.choice(WHITELIST, tokens.shape), tokens)


def _loop(batch: int, num_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each sequence runs round in 40 tokens of its own."""
    cycles = np.random.default_rng(0).integers(0, VOCABULARY, (batch, 40))
    return np.tile(cycles, (1, 1 + num_tokens // 40))[:, :num_tokens]


def run() -> Iterator[Row]:
    """A row per batch size, and one for the largest batch in a loop."""
    stock = import_stock().NGramPerReqLogitsProcessor
    torch.set_num_threads(1)
    for name, streams, batches in (("text", _text, BATCHES), ("loop", _loop, BATCHES[-1:])):
        for batch in batches:
            steps = {"ours": 25_600 // batch if batch < 256 else 400, "peer": max(4, 1024 // batch)}
            steps["floor"] = steps["ours"] = min(steps["ours"], MAX_LENGTH - _NUM_BEFORE)
            work = Workload(streams(batch, _NUM_BEFORE + steps["ours"]), torch.zeros(batch, VOCABULARY))
            builds = {"ours": NGramGuard, "peer": stock, "floor": EmptyProcessor}
            # Taken in turns, so that what else runs on the machine meets all alike; the least is what the work needs.
            turns = [
                {who: work.us_per_token(build, steps[who]) for who, build in builds.items()} for _ in range(_REPEATS)
            ]
            ours, peer, floor = (min(turn[who] for turn in turns) for who in builds)
            yield Row.of_costs(f"ngram 30/90, {name}, batch {batch}", ours, peer, NAME, floor, "us CPU per token")
