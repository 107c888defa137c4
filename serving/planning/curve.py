"""A model of one replica's speed, and its fit to measurements. Pure.

Continuous batching is a loop of steps. A step produces one token for every running sequence and takes longer the more
there are; prompts that enter with it (image encoder and prefill) add time, during which the others wait. Four numbers
therefore describe an engine: the fixed time of a step, the time per sequence, the time per prompt, and the time that a
request spends outside the loop (network, image preprocessing, parsing).
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
    """Time of a step, regardless of what runs."""
    per_seq_s: float
    """Time of a step per running sequence."""
    prefill_s: float
    """Time of a prompt with its page."""
    overhead_s: float
    """Time of a request outside the engine's loop."""
    max_seqs: int
    """Sequences that run concurrently."""
    kv_tokens: int
    """Size of the KV cache in tokens."""
    prompts_per_step: int = 16
    """Prompts that may enter with one step (vLLM's `max_num_batched_tokens` divided by a prompt's tokens)."""

    def step_s(self, num_seqs: float, num_prompts: int = 0) -> float:
        """Return the time of a step with so many sequences, of which so many are new."""
        return self.base_s + self.per_seq_s * num_seqs + self.prefill_s * num_prompts

    def num_places(self, tokens_per_seq: float) -> int:
        """Return how many sequences of this size (prompt and answer) fit, by their number and by the KV cache."""
        return max(1, min(self.max_seqs, int(self.kv_tokens / tokens_per_seq)))

    def peak_pages_per_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Return the rate of a replica that is always full, regardless of latency."""
        places = self.num_places(prompt_tokens + output_tokens)
        return places / (output_tokens * self.step_s(places) + places * self.prefill_s)

    def lone_s(self, output_tokens: float) -> float:
        """Return the time of a page that is alone on the replica."""
        return self.overhead_s + self.prefill_s + output_tokens * self.step_s(1)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One closed-loop measurement: so many clients, each of which sends its next request after its answer."""

    concurrency: int
    output_tokens: int
    """Tokens of every answer."""
    request_s: float
    """Mean time of a request."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A curve and its error against the measurements."""

    curve: ServiceCurve
    worst_error: float
    """Largest relative error of a point's time."""


def fit_curve(points: Sequence[CurvePoint], *, max_seqs: int, kv_tokens: int, prompts_per_step: int = 16) -> Fit:
    """Fit a curve to the points by least squares of relative errors, with no negative coefficient.

    With n sequences always running, a request of L tokens takes overhead + L (base + n per_seq) + n prefill: while it
    runs, each of the n places is refilled once. Clients are not in the engine during the overhead, so n is slightly
    less than their number; it is computed in alternation with the fit.

    Raises:
        ValueError: there are too few points, or they are too similar to determine the four numbers.
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
    """Return the factors of overhead, base, per_seq and prefill in a request's time."""
    return 1.0, point.output_tokens, point.output_tokens * num_seqs, num_seqs


def _solve(rows: np.ndarray) -> np.ndarray:
    """Solve rows x = 1 by least squares over x >= 0, by removing the most negative coefficient until there is none."""
    used = list(range(rows.shape[1]))
    while True:
        solution = np.zeros(rows.shape[1])
        solution[used] = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)[0]
        worst = int(np.argmin(solution))
        if solution[worst] >= 0:
            return solution
        used.remove(worst)
