from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.planning.curve import ServiceCurve
from serving.planning.simulation import Pages
from serving.planning.sizing import CELL, PlanError, Sizing

CURVE = ServiceCurve(0.01, 0.001, 0.02, 0.02, max_seqs=32, kv_tokens=50_000)
PAGES = Pages(80, 60, 0.4)
SIZING = Sizing(CURVE, PAGES, slo_p95_s=1.8, max_utilisation=0.85)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4))
def test_more_pages_never_need_fewer_replicas(one: float, other: float) -> None:
    fewer, more = sorted((one, other))
    assert SIZING.num_replicas(fewer) <= SIZING.num_replicas(more)


@pytest.mark.parametrize("rate", [3.0, 30.0, 200.0])
def test_what_it_gives_keeps_the_promise_and_one_less_does_not(rate: float) -> None:
    needed = SIZING.num_replicas(rate)
    assert SIZING.look(needed, rate).p95_s <= 1.8 * 1.05
    if needed > 1:
        fewer = needed - max(1, needed // 10)
        is_late = SIZING.look(fewer, rate).p95_s > 1.8
        assert is_late or rate / fewer > 0.85 * SIZING.peak_rate


def test_more_time_never_needs_more_replicas() -> None:
    needed = [Sizing(CURVE, PAGES, slo, 0.85).num_replicas(100) for slo in (1.6, 2.0, 3.0, 10.0)]
    assert needed == sorted(needed, reverse=True)


def test_however_much_time_there_is_engines_are_not_driven_to_their_peak() -> None:
    sizing = Sizing(CURVE, PAGES, slo_p95_s=1e4, max_utilisation=0.5)
    assert sizing.rate_per_replica(CELL) == pytest.approx(sizing.peak_rate * 0.5)


def test_a_promise_that_no_page_keeps_is_refused() -> None:
    with pytest.raises(PlanError, match="alone on their replica take"):
        Sizing(CURVE, PAGES, slo_p95_s=0.1, max_utilisation=0.85).num_replicas(1)
