"""The simulation's predictions beside measurements: what is taken from which slices of a check. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from serving.planning.curve import CurvePoint, Fit, ServiceCurve, fit_curve
from serving.planning.simulation import Pages, SimulatedRun, percentile, run_closed, run_trace

GRID = ((1, 8), (1, 96), (4, 8), (4, 96), (12, 8), (12, 96))
"""Concurrency and tokens per answer of the calibration."""
REQUESTS_PER_CLIENT = 2
LENGTHS = (24, 128)
OPEN_LOAD = 0.6
"""Of what a replica does that is always full."""
CLOSED_CLIENTS = 8
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer."""

    asked_s: float
    took_s: float
    num_output: int
    num_prompt: int


@dataclass(slots=True)
class Calibration:
    """Times of requests, by concurrency and length."""

    times: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    num_prompt: int = 0

    def add(self, concurrency: int, num_output: int, readings: Sequence[Reading]) -> None:
        """A slice at one point of the grid."""
        self.num_prompt = readings[0].num_prompt
        taken_s = statistics.mean(reading.took_s for reading in readings)
        self.times.setdefault((concurrency, num_output), []).append(taken_s)

    def points(self) -> list[CurvePoint]:
        """Means over the rounds."""
        return [CurvePoint(*where, statistics.mean(times)) for where, times in self.times.items()]

    def fit(self, max_seqs: int, kv_tokens: int) -> Fit:
        return fit_curve(self.points(), max_seqs=max_seqs, kv_tokens=kv_tokens)

    def slowness(self, number: int) -> float:
        """How much longer everything took around the load of this round than on the whole: the slices before and after
        it against the mean slice, long requests counting the more."""
        around = sum(times[turn] for times in self.times.values() for turn in (number, number + 1)) / 2
        return around / sum(map(statistics.mean, self.times.values()))


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
class Measured:
    """All slices of a check."""

    max_seqs: int
    kv_tokens: int
    calibration: Calibration = field(default_factory=Calibration)
    """A slice before the first load, and one after each."""
    traces: list[list[tuple[float, int]]] = field(default_factory=list)
    opened: list[list[Reading]] = field(default_factory=list)
    closed: list[list[Reading]] = field(default_factory=list)

    def compare(self) -> tuple[Fit, list[Comparison]]:
        """Prediction beside measurement."""
        fit = self.calibration.fit(self.max_seqs, self.kv_tokens)
        curves = [slow_down(fit.curve, self.calibration.slowness(number)) for number in range(len(self.traces))]
        pages = Pages(self.calibration.num_prompt, sum(LENGTHS) / 2)
        opened = [
            run_trace(curve, pages, trace, num_replicas=1) for curve, trace in zip(curves, self.traces, strict=True)
        ]
        closed = [
            run_closed(
                curve,
                pages,
                [reading.num_output for reading in readings],
                num_replicas=1,
                num_clients=CLOSED_CLIENTS,
            )
            for curve, readings in zip(curves, self.closed, strict=True)
        ]
        # How many tokens come of arrivals at random is no prediction: as many as were asked for.
        rows = compare_times("at random", opened, self.opened)
        rows += compare_times(f"{CLOSED_CLIENTS} clients", closed, self.closed)
        rows.append(compare_throughput(f"{CLOSED_CLIENTS} clients", closed, self.closed))
        return fit, rows


def slow_down(curve: ServiceCurve, factor: float) -> ServiceCurve:
    """The same engine on a machine on which everything takes so much longer."""
    return replace(
        curve,
        base_s=curve.base_s * factor,
        per_seq_s=curve.per_seq_s * factor,
        prefill_s=curve.prefill_s * factor,
        overhead_s=curve.overhead_s * factor,
    )


def compare_times(
    load: str, predicted: Sequence[SimulatedRun], measured: Sequence[Sequence[Reading]]
) -> list[Comparison]:
    """Times of pages, all slices of a kind together."""
    ours = sorted(time_s for run in predicted for time_s in run.times_s)
    theirs = sorted(reading.took_s for readings in measured for reading in readings)
    figures = [(name, percentile(ours, part), percentile(theirs, part)) for name, part in (("p50", 0.5), ("p95", 0.95))]
    figures.append(("mean", statistics.mean(ours), statistics.mean(theirs)))
    return [Comparison(load, name, our_s, their_s, "s") for name, our_s, their_s in figures]


def compare_throughput(
    load: str, predicted: Sequence[SimulatedRun], measured: Sequence[Sequence[Reading]]
) -> Comparison:
    """Tokens per second from first question to last answer."""
    num_tokens = sum(reading.num_output for readings in measured for reading in readings)
    took_s = sum(
        max(reading.asked_s + reading.took_s for reading in readings) - min(reading.asked_s for reading in readings)
        for readings in measured
    )
    our_s = sum(run.took_s for run in predicted)
    return Comparison(load, "throughput", num_tokens / our_s, num_tokens / took_s, "tokens/s")


def draw_trace(rng: Random, pages_per_s: float, seconds: float, lengths: tuple[int, int]) -> list[tuple[float, int]]:
    """Poisson arrivals for so long; lengths are uniform in a range."""
    trace, now_s = list[tuple[float, int]](), 0.0
    while True:
        gap_s = rng.expovariate(pages_per_s)
        now_s += gap_s
        if now_s > seconds:
            return trace
        trace.append((gap_s, rng.randint(*lengths)))
