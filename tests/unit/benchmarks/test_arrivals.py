"""Open-loop schedules: their rates, their shapes, and what is left of them when several processes share one."""

from __future__ import annotations

import itertools
import statistics

import pytest

from benchmarks.load.arrivals import Shape, rate_factor, schedule, share


@pytest.mark.parametrize("shape", Shape)
def test_the_mean_rate_is_the_one_asked_for(shape: Shape) -> None:
    times = list(schedule(shape, 50, 200, seed=3))
    assert len(times) == pytest.approx(10_000, rel=0.04)
    assert times == sorted(times)
    assert times[-1] < 200


@pytest.mark.parametrize("shape", Shape)
def test_the_same_seed_gives_the_same_schedule(shape: Shape) -> None:
    assert list(schedule(shape, 5, 20, seed=1)) == list(schedule(shape, 5, 20, seed=1))


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert list(schedule(Shape.CONSTANT, 2, 2, seed=0)) == [0.0, 0.5, 1.0, 1.5]


def test_poisson_gaps_vary_as_exponential_ones_do() -> None:
    gaps = [later - earlier for earlier, later in itertools.pairwise(schedule(Shape.POISSON, 20, 1000, seed=5))]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)


def test_a_burst_is_six_times_as_dense_as_the_time_between() -> None:
    times = list(schedule(Shape.BURST, 50, 400, seed=2))
    inside = sum(at_s % 20 < 4 for at_s in times) / (400 * 0.2)
    outside = sum(at_s % 20 >= 4 for at_s in times) / (400 * 0.8)
    assert inside / outside == pytest.approx(6, rel=0.1)


def test_a_day_has_its_night_at_the_ends_and_its_noon_in_the_middle() -> None:
    assert rate_factor(Shape.DAILY, 0, 60) == pytest.approx(0.2)
    assert rate_factor(Shape.DAILY, 30, 60) == pytest.approx(1.8)


def test_processes_share_a_schedule_without_changing_it() -> None:
    whole = list(schedule(Shape.BURST, 10, 30, seed=4))
    parts = [list(share(schedule(Shape.BURST, 10, 30, seed=4), index, 3)) for index in range(3)]
    assert sorted(itertools.chain(*parts)) == whole


@pytest.mark.parametrize(("per_s", "duration_s"), [(0, 10), (1, 0), (-1, 10)])
def test_a_rate_or_a_duration_that_is_not_positive_is_refused(per_s: float, duration_s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        schedule(Shape.POISSON, per_s, duration_s, seed=0)
