"""The check of the simulation, with a simulated stack on a machine whose speed changes in the place of a real one."""

from __future__ import annotations

from random import Random

import pytest

from benchmarks.planning.comparison import (
    CLOSED_CLIENTS,
    GRID,
    LENGTHS,
    TOLERANCE,
    Comparison,
    Measured,
    Reading,
    draw_trace,
    slow_down,
)
from serving.planning.curve import ServiceCurve
from serving.planning.simulation import Pages, SimulatedRun, run_closed, run_trace

ENGINE = ServiceCurve(base_s=0.012, per_seq_s=0.002, prefill_s=0.06, overhead_s=0.03, max_seqs=64, kv_tokens=100_000)
PAGES = Pages(80, sum(LENGTHS) / 2)
RATE, SECONDS = 1.5, 20.0


def read(run: SimulatedRun) -> list[Reading]:
    """A run as clients would have measured it."""
    return [
        Reading(job.arrived_s, time_s, job.num_output, job.prompt_tokens)
        for job, time_s in zip(run.jobs, run.times_s, strict=True)
    ]


def check(calibration_speeds: list[float], load_speeds: list[float]) -> list[Comparison]:
    """A check whose slices found the machine as slow as is said."""
    one = Measured(ENGINE.max_seqs, ENGINE.kv_tokens)
    for factor in calibration_speeds:
        for concurrency, length in GRID:
            lengths = [length] * (concurrency * 2)
            run = run_closed(slow_down(ENGINE, factor), PAGES, lengths, num_replicas=1, num_clients=concurrency)
            one.calibration.add(concurrency, length, read(run))
    rng = Random(3)
    for factor in load_speeds:
        curve = slow_down(ENGINE, factor)
        one.traces.append(draw_trace(rng, RATE, SECONDS, LENGTHS))
        one.opened.append(read(run_trace(curve, PAGES, one.traces[-1], num_replicas=1)))
        lengths = [rng.randint(*LENGTHS) for _ in range(CLOSED_CLIENTS * 4)]
        one.closed.append(read(run_closed(curve, PAGES, lengths, num_replicas=1, num_clients=CLOSED_CLIENTS)))
    _, rows = one.compare()
    return rows


@pytest.mark.parametrize(
    ("calibration", "loads"),
    [
        ([1.0] * 5, [1.0] * 4),
        ([1.0, 1.0, 1.6, 1.6, 1.0], [1.0, 1.3, 1.6, 1.3]),  # something else ran in the middle
        ([1.0, 1.2, 1.4, 1.6, 1.8], [1.1, 1.3, 1.5, 1.7]),
    ],
)
def test_an_engine_of_the_models_kind_is_predicted_on_a_machine_that_changes(
    calibration: list[float], loads: list[float]
) -> None:
    for row in check(calibration, loads):
        assert abs(row.error) < TOLERANCE / 2, row


def test_loads_that_took_half_as_long_again_are_told_from_what_was_predicted() -> None:
    rows = check([1.0] * 5, [1.5] * 4)
    assert all(abs(row.error) > TOLERANCE for row in rows), rows
