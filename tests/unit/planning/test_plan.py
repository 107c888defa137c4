from __future__ import annotations

from dataclasses import replace

import pytest

from serving.planning.curve import ServiceCurve
from serving.planning.figures import Basis, load_figures
from serving.planning.plan import MeasuredCurve, PlanQuestion, build_plan, normalise, sine_day
from serving.planning.sheet import PlanSheet
from serving.planning.sizing import PlanError

FIGURES = load_figures()
QUESTION = PlanQuestion(33e6, "base", 20.0)
FAST = MeasuredCurve(ServiceCurve(0.005, 0.0001, 0.01, 0.05, 256, 400_000), "a bench of ours")
QUICK = replace(QUESTION, slo_p95_s=120.0, measured=FAST)
"""So much time that engines may be as busy as ever allowed: no rate has to be searched for, by simulation."""


@pytest.fixture(scope="module")
def sheet() -> PlanSheet:
    """The plan that the documentation shows."""
    return build_plan(QUESTION, FIGURES)


def test_33_million_pages_a_day(sheet: PlanSheet) -> None:
    assert sheet["mean_rate"] == pytest.approx(381.9, abs=0.1)
    assert sheet["gpus_floor"] == 165
    assert sheet["gpus"] > sheet["gpus_floor"]
    assert sheet["gpus"] % 8 == 0
    assert sheet["p95"] <= 20 * 1.05
    assert sheet["rows"] == 33e6
    assert sheet["dollars"] == pytest.approx(sheet["gpu_dollars"] + sheet["router_dollars"])
    assert sheet["dollars_scaled"] < sheet["dollars"]
    assert sheet["revenue"] == pytest.approx(33e6 * (279 * 0.03 + 1080 * 0.10) / 1e6, rel=1e-3)


def test_every_number_says_what_it_rests_on(sheet: PlanSheet) -> None:
    known = sheet.lines.keys() | sheet.used.keys()
    assert all(line.how and set(line.rests_on) <= known for line in sheet.lines.values())
    assert sheet.lines["replicas"].is_extrapolated
    assert not sheet.lines["mean_rate"].is_extrapolated


def test_with_numbers_of_ones_own_nothing_is_extrapolated() -> None:
    own = {key: FIGURES.value(key) for key in ("output_tokens", "output_spread", "peak_to_mean", "max_utilisation")}
    sheet = build_plan(QUICK, FIGURES.with_values({**own, "prompt_text_tokens": 6.0}))
    assert sheet.lines["replicas"].basis is Basis.MEASURED
    assert sheet.used["curve"].source == "a bench of ours"
    assert "published_tokens_per_s" not in sheet.used


def test_more_pages_never_need_less() -> None:
    sheets = [build_plan(replace(QUICK, pages_per_day=pages), FIGURES) for pages in (1.2e7, 3e7)]
    for key in ("replicas", "gpus", "cores_images", "cores_routers", "net_in", "ledger_bytes", "dollars"):
        assert sheets[0][key] <= sheets[1][key]


def test_a_day_of_ones_own() -> None:
    flat = build_plan(replace(QUICK, daily_curve=(3.0, 3.0)), FIGURES)
    steep = build_plan(replace(QUICK, daily_curve=(0.0, 1.0, 5.0)), FIGURES)
    assert flat["peak_rate"] == pytest.approx(flat["mean_rate"])
    assert steep["peak_rate"] == pytest.approx(steep["mean_rate"] * 2.5)
    assert steep["replicas"] > flat["replicas"]
    assert "peak_to_mean" not in steep.used


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (replace(QUESTION, pages_per_day=0), "above zero"),
        (replace(QUESTION, mode="huge"), "no mode huge"),
        (replace(QUESTION, slo_p95_s=1), "alone on their replica"),
        (replace(QUESTION, daily_curve=(0.0,)), "daily curve"),
    ],
)
def test_what_cannot_be_planned_is_refused(question: PlanQuestion, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        build_plan(question, FIGURES)


def test_a_peak_that_no_sine_has_is_refused() -> None:
    with pytest.raises(PlanError, match="daily-curve"):
        build_plan(QUESTION, FIGURES.with_values({"peak_to_mean": 3.0}))
    with pytest.raises(PlanError, match="alone must be faster"):
        build_plan(QUESTION, FIGURES.with_values({"alone_tokens_per_s": 20.0}))


def test_days_have_a_mean_of_one() -> None:
    assert sum(sine_day(1.7)) == pytest.approx(24)
    assert max(sine_day(1.7)) == pytest.approx(1.7)
    assert normalise((1, 2, 3)) == pytest.approx((0.5, 1.0, 1.5))
