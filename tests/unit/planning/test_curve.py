from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.planning.curve import CurvePoint, ServiceCurve, fit_curve
from serving.planning.simulation import Pages, simulate_closed

TRUE = ServiceCurve(0.02, 0.002, 0.05, 0.03, max_seqs=64, kv_tokens=60_000)
GRID = [(1, 8), (4, 8), (16, 8), (1, 64), (4, 64), (16, 64)]


def measured(curve: ServiceCurve, concurrency: int, output_tokens: int) -> CurvePoint:
    """What the simulated engine does."""
    pages = Pages(80, output_tokens)
    outcome = simulate_closed(curve, pages, num_replicas=1, num_clients=concurrency, num_pages=concurrency * 20)
    return CurvePoint(concurrency, output_tokens, outcome.mean_s)


def test_a_fit_to_a_simulated_engine_finds_its_numbers() -> None:
    fit = fit_curve([measured(TRUE, *where) for where in GRID], max_seqs=64, kv_tokens=60_000)
    assert fit.worst_error < 0.08
    assert fit.curve.base_s == pytest.approx(TRUE.base_s, rel=0.1)
    assert fit.curve.per_seq_s == pytest.approx(TRUE.per_seq_s, rel=0.1)
    assert fit.curve.prefill_s == pytest.approx(TRUE.prefill_s, rel=0.2)


def test_a_fit_needs_points_that_differ() -> None:
    point = CurvePoint(1, 8, 0.5)
    with pytest.raises(ValueError, match="4 points"):
        fit_curve([point] * 3, max_seqs=1, kv_tokens=1)
    with pytest.raises(ValueError, match="differ"):
        fit_curve([point, CurvePoint(2, 8, 0.6), CurvePoint(3, 8, 0.7), CurvePoint(4, 8, 0.8)], max_seqs=1, kv_tokens=1)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 256), st.floats(0.001, 100)), min_size=4, max_size=10))
def test_no_part_of_a_fit_is_negative(points: list[tuple[int, int, float]]) -> None:
    given_points = [CurvePoint(*point) for point in points]
    try:
        curve = fit_curve(given_points, max_seqs=64, kv_tokens=10_000).curve
    except ValueError:
        return
    assert min(curve.base_s, curve.per_seq_s, curve.prefill_s, curve.overhead_s) >= 0


def test_places_are_bound_by_the_cache_too() -> None:
    assert TRUE.num_places(100) == 64
    assert TRUE.num_places(6000) == 10
    assert TRUE.num_places(10**9) == 1
