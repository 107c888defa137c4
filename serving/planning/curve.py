"""How long an engine's work takes: the model of one replica, and its fit to a measurement. Pure.

Continuous batching is a loop of steps. A step gives every running sequence one token and takes the longer the more
there are; the prompts that enter with it (image encoder and prefill) add their own time, during which the others wait.
So four numbers make an engine: a step's fixed part, its part per sequence, the time of a prompt, and what a request
costs outside of the loop (the way there and back, image preprocessing, the first look at it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 5
_NUM_UNKNOWNS = 4


@dataclass(frozen=True, slots=True)
class ServiceCurve:
    """One replica. Times in seconds."""

    base_s: float
    """Of a step, whatever runs."""
    per_seq_s: float
    """Of a step, for each sequence."""
    prefill_s: float
    """Of a prompt with its page."""
    overhead_s: float
    """Of a request, outside of the engine's loop."""
    max_seqs: int
    """Sequences that run at once."""
    kv_tokens: int
    """What the KV cache holds."""
    prompts_per_step: int = 16
    """That may enter with one step (vLLM's `max_num_batched_tokens` over a prompt's tokens)."""

    def step_s(self, num_seqs: float, num_prompts: int = 0) -> float:
        """A step with so many sequences, of which so many have just come."""
        return self.base_s + self.per_seq_s * num_seqs + self.prefill_s * num_prompts

    def num_places(self, tokens_per_seq: float) -> int:
        """Sequences of this size (prompt and answer) that run at once: places, or room in the KV cache."""
        return max(1, min(self.max_seqs, int(self.kv_tokens / tokens_per_seq)))

    def peak_pages_per_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """What a replica does that is always full, however long its answers take."""
        places = self.num_places(prompt_tokens + output_tokens)
        return places / (output_tokens * self.step_s(places) + places * self.prefill_s)

    def lone_s(self, output_tokens: float) -> float:
        """A page that has the replica for itself."""
        return self.overhead_s + self.prefill_s + output_tokens * self.step_s(1)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measurement in a closed loop: so many clients, each of whom asks again as soon as it has its answer."""

    concurrency: int
    output_tokens: int
    """Of every answer."""
    request_s: float
    """Mean time of a request."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A curve, and how far it is from what was measured."""

    curve: ServiceCurve
    worst_error: float
    """Largest part by which a point's time is missed."""


def fit_curve(points: Sequence[CurvePoint], *, max_seqs: int, kv_tokens: int, prompts_per_step: int = 16) -> Fit:
    """The curve that fits the points best, by least squares of relative errors; no part of it is negative.

    With n sequences running all the time a request of L tokens takes overhead + L (base + n per_seq) + n prefill: while
    it runs, each of the n places is filled anew once. Clients are not in the engine during the overhead, so n is a
    little less than their number; it is found in turns with the fit.

    Raises:
        ValueError: there are too few points, or they are too alike to tell the four numbers apart.
    """
    if len(points) < _NUM_UNKNOWNS:
        raise ValueError(f"a curve needs {_NUM_UNKNOWNS} points at least, not {len(points)}")
    if len({point.concurrency for point in points}) < 2 or len({point.output_tokens for point in points}) < 2:
        raise ValueError("the points must differ in both concurrency and the length of answers")
    overhead_s = 0.0
    for _ in range(_ROUNDS):
        rows = np.array([_row(point, _num_running(point, overhead_s, max_seqs)) for point in points])
        solution = _solve(rows / np.array([[point.request_s] for point in points]))
        overhead_s = float(solution[0])
    base_s, per_seq_s, prefill_s = map(float, solution[1:])
    curve = ServiceCurve(base_s, per_seq_s, prefill_s, overhead_s, max_seqs, kv_tokens, prompts_per_step)
    predicted = rows @ solution
    errors = [abs(said / point.request_s - 1) for said, point in zip(predicted, points, strict=True)]
    return Fit(curve, float(max(errors)))


def _num_running(point: CurvePoint, overhead_s: float, max_seqs: int) -> float:
    return min(max_seqs, point.concurrency * max(0.0, 1 - overhead_s / point.request_s))


def _row(point: CurvePoint, num_seqs: float) -> tuple[float, float, float, float]:
    """The factors of overhead, base, per sequence and prefill in a request's time."""
    return 1.0, point.output_tokens, point.output_tokens * num_seqs, num_seqs


def _solve(rows: np.ndarray) -> np.ndarray:
    """Least squares of rows x = 1 over x >= 0, by leaving out the most negative part until there is none."""
    used = list(range(rows.shape[1]))
    while True:
        solution = np.zeros(rows.shape[1])
        solution[used] = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)[0]
        worst = int(np.argmin(solution))
        if solution[worst] >= 0:
            return solution
        used.remove(worst)
