"""Whether the simulation comes true: calibrate the nano stack, predict other loads, apply them, compare.

A shared machine is now fast, now slow. So calibration and loads take turns in short slices, and each side is pooled
over all rounds: whatever else runs falls on both. The predicted loads differ from those of the calibration: answers of
mixed lengths, another concurrency, and arrivals at random that don't wait for anybody.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from benchmarks.planning.clients import Reader, Reading, draw_trace, nano_images, read_closed, read_trace
from benchmarks.router.servers import run_engine, run_gateway
from benchmarks.router.stack import run_stack
from serving.planning.curve import CurvePoint, Fit, fit_curve
from serving.planning.simulation import Pages, Run, percentile, run_closed, run_trace

GRID = ((1, 8), (1, 96), (4, 8), (4, 96), (12, 8), (12, 96))
"""Concurrency and tokens per answer of the calibration."""
REQUESTS_PER_CLIENT = 2
LENGTHS = (24, 128)
OPEN_LOAD = 0.6
"""Of what a replica does that is always full."""
CLOSED_CLIENTS = 8
TOLERANCE = 0.15
MAX_SEQS = 64
"""Of configs/local.yaml."""
SCRIPTED_SEQS = 12

Say = Callable[[str], None]


@contextlib.contextmanager
def run_nano() -> Iterator[tuple[Reader, int, int]]:
    """`serving up` with configs/local.yaml; a reader, and the engine's places and room."""
    with run_stack() as stack:
        with urllib.request.urlopen(f"{stack.url}/admin/state", timeout=60) as answer:
            kv_tokens = int(json.load(answer)["replicas"][0]["capacity_tokens"])
        yield Reader(stack.url, "nano", nano_images()), MAX_SEQS, kv_tokens


@contextlib.contextmanager
def run_scripted() -> Iterator[tuple[Reader, int, int]]:
    """One router process and a scripted engine with few places. Its prompts take no time: those of vLLM hold up what
    runs, those of the script would not."""
    flags = ["--tokens-per-s", "60", "--output-tokens", "256"]
    with run_engine(*flags, "--max-num-seqs", str(SCRIPTED_SEQS)) as engine, run_gateway(engine) as router:
        yield Reader(router.url, "nano", nano_images()), SCRIPTED_SEQS, 1 << 30


@dataclass(slots=True)
class Calibration:
    """Times of requests, by concurrency and length."""

    times: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    num_prompt: int = 0

    async def run(self, reader: Reader, grid: Iterable[tuple[int, int]] = GRID) -> None:
        """One round over the grid."""
        for concurrency, num_output in grid:
            lengths = [num_output] * (concurrency * REQUESTS_PER_CLIENT)
            readings = await read_closed(reader, concurrency, lengths)
            self.num_prompt = readings[0].num_prompt
            self.times.setdefault((concurrency, num_output), []).append(
                statistics.mean(reading.took_s for reading in readings)
            )

    def points(self) -> list[CurvePoint]:
        """Means over the rounds."""
        return [CurvePoint(*where, statistics.mean(times)) for where, times in self.times.items()]

    def fit(self, max_seqs: int, kv_tokens: int) -> Fit:
        return fit_curve(self.points(), max_seqs=max_seqs, kv_tokens=kv_tokens)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one load."""

    load: str
    figure: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(slots=True)
class Check:
    """A whole check of one stack."""

    reader: Reader
    max_seqs: int
    kv_tokens: int
    seconds: float
    """Of a slice of arrivals at random."""
    say: Say
    rng: Random = field(default_factory=lambda: Random(11))
    calibration: Calibration = field(default_factory=Calibration)
    traces: list[list[tuple[float, int]]] = field(default_factory=list)
    opened: list[list[Reading]] = field(default_factory=list)
    closed: list[list[Reading]] = field(default_factory=list)

    async def run(self, num_rounds: int) -> None:
        """Calibrate and load in turns. A first round warms up, and says how fast pages may come."""
        await self.calibration.run(self.reader)
        curve = self.calibration.fit(self.max_seqs, self.kv_tokens).curve
        rate = OPEN_LOAD * curve.peak_pages_per_s(self.calibration.num_prompt, sum(LENGTHS) / 2)
        # On a CPU a full house gains little over a dozen at a time, and takes long.
        at_12 = 12 / (curve.overhead_s + sum(LENGTHS) / 2 * curve.step_s(12) + 12 * curve.prefill_s)
        rate = min(rate, OPEN_LOAD * at_12)
        self.calibration = Calibration()
        for number in range(num_rounds):
            self.say(f"round {number + 1} of {num_rounds}: calibrating")
            await self.calibration.run(self.reader)
            self.say(f"round {number + 1} of {num_rounds}: {rate:.2f} pages/s at random")
            self.traces.append(draw_trace(self.rng, rate, self.seconds, LENGTHS))
            self.opened.append(await read_trace(self.reader, self.traces[-1]))
            self.say(f"round {number + 1} of {num_rounds}: {CLOSED_CLIENTS} clients")
            lengths = [self.rng.randint(*LENGTHS) for _ in range(CLOSED_CLIENTS * 4)]
            self.closed.append(await read_closed(self.reader, CLOSED_CLIENTS, lengths))

    def compare(self) -> tuple[Fit, list[Comparison]]:
        """Prediction beside measurement."""
        fit = self.calibration.fit(self.max_seqs, self.kv_tokens)
        pages = Pages(self.calibration.num_prompt, sum(LENGTHS) / 2)
        rows = []
        predicted = [run_trace(fit.curve, pages, trace, num_replicas=1) for trace in self.traces]
        rows += _compare("at random", predicted, self.opened)
        predicted = [
            run_closed(
                fit.curve,
                pages,
                [reading.num_output for reading in readings],
                num_replicas=1,
                num_clients=CLOSED_CLIENTS,
            )
            for readings in self.closed
        ]
        rows += _compare(f"{CLOSED_CLIENTS} clients", predicted, self.closed)
        return fit, rows


def _compare(load: str, predicted: Sequence[Run], measured: Sequence[Sequence[Reading]]) -> Iterable[Comparison]:
    """All slices of a kind together: times of pages, and tokens per second from first question to last answer."""
    ours = sorted(time_s for run in predicted for time_s in run.times_s)
    theirs = sorted(reading.took_s for readings in measured for reading in readings)
    for name, part in (("p50", 0.50), ("p95", 0.95)):
        yield Comparison(load, name, percentile(ours, part), percentile(theirs, part), "s")
    num_tokens = sum(reading.num_output for readings in measured for reading in readings)
    took_s = sum(
        max(reading.asked_s + reading.took_s for reading in readings) - min(reading.asked_s for reading in readings)
        for readings in measured
    )
    yield Comparison(
        load, "throughput", num_tokens / sum(run.took_s for run in predicted), num_tokens / took_s, "tokens/s"
    )


def to_json(fit: Fit, rows: Sequence[Comparison], points: Sequence[CurvePoint]) -> dict[str, Any]:
    """All of it, for a file."""
    return {
        "curve": asdict(fit.curve),
        "worst_error_of_fit": fit.worst_error,
        "points": [asdict(point) for point in points],
        "rows": [{**asdict(row), "error": row.error} for row in rows],
    }
