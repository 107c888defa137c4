from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.planning.curve import ServiceCurve
from serving.planning.simulation import Pages, percentile, simulate_closed, simulate_open

CURVE = ServiceCurve(0.02, 0.001, 0.05, 0.03, max_seqs=16, kv_tokens=50_000)
PAGES = Pages(80, 100, 0.5)


def test_a_page_that_is_alone_takes_its_steps() -> None:
    pages = Pages(80, 100)
    outcome = simulate_open(CURVE, pages, num_replicas=1, pages_per_s=0.01, num_pages=50)
    assert outcome.p50_s == pytest.approx(CURVE.lone_s(100))
    assert outcome.first_p95_s == pytest.approx(0.03 + 0.05 + 0.021, rel=0.1)


def test_clients_in_a_closed_loop_get_what_the_sum_says() -> None:
    outcome = simulate_closed(CURVE, Pages(80, 100), num_replicas=1, num_clients=8, num_pages=400)
    assert outcome.mean_s == pytest.approx(0.03 + 100 * CURVE.step_s(8) + 8 * 0.05, rel=0.02)
    assert outcome.tokens_per_s == pytest.approx(8 * 100 / outcome.mean_s, rel=0.05)


@pytest.mark.parametrize("change", [{"max_seqs": 4}, {"kv_tokens": 800}])
def test_who_has_no_place_or_no_room_waits(change: dict[str, int]) -> None:
    narrow = replace(CURVE, **change)
    wide, tight = (
        simulate_closed(curve, Pages(80, 100), num_replicas=1, num_clients=16, num_pages=400)
        for curve in (CURVE, narrow)
    )
    assert tight.pages_per_s < wide.pages_per_s
    assert tight.first_p95_s > wide.first_p95_s


def test_an_engine_that_is_always_full_reaches_its_peak_and_no_more() -> None:
    outcome = simulate_open(CURVE, Pages(80, 100), num_replicas=2, pages_per_s=100, num_pages=2000)
    assert outcome.pages_per_s == pytest.approx(2 * CURVE.peak_pages_per_s(80, 100), rel=0.03)
    assert outcome.busy > 0.98


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10), st.floats(0.05, 3), st.integers(1, 1000))
def test_every_page_ends_and_percentiles_are_in_order(num_replicas: int, rate: float, seed: int) -> None:
    outcome = simulate_open(CURVE, PAGES, num_replicas=num_replicas, pages_per_s=rate, num_pages=100, seed=seed)
    assert CURVE.lone_s(1) <= outcome.p50_s <= outcome.p95_s <= outcome.p99_s
    assert outcome.first_p95_s <= outcome.p95_s
    assert 0 < outcome.busy <= 1 + 1e-9


def test_the_same_seed_gives_the_same_outcome() -> None:
    first, again = (simulate_open(CURVE, PAGES, num_replicas=3, pages_per_s=2, num_pages=300, seed=7) for _ in range(2))
    assert first == again


def test_more_load_takes_longer() -> None:
    outcomes = [simulate_open(CURVE, PAGES, num_replicas=4, pages_per_s=rate, num_pages=2000) for rate in (1, 4, 8, 12)]
    times = [outcome.p95_s for outcome in outcomes]
    assert times == sorted(times)


def test_answers_have_the_mean_that_was_asked_for() -> None:
    from random import Random

    rng = Random(1)
    lengths = [Pages(80, 500, 0.6).draw(rng) for _ in range(20_000)]
    assert sum(lengths) / len(lengths) == pytest.approx(500, rel=0.03)
    assert max(Pages(80, 500, 0.6, max_output=700).draw(rng) for _ in range(500)) == 700


def test_percentile_is_interpolated() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.75) == 1.75
    assert percentile([4.0], 0.99) == 4.0
