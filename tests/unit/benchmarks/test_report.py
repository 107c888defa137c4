"""The report: every figure from the results, misses listed, and nothing invented for what was not measured."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.documents import Document, read_documents
from benchmarks.effort import VARIABLE, Effort, rounds
from benchmarks.fastpath.rows import Row
from benchmarks.machine import describe_run, read_cpu_model
from benchmarks.registry import BENCHMARKS, choose
from benchmarks.report.figures import UNMEASURED, Figures, number
from benchmarks.report.plots import PLOTS, draw_all
from benchmarks.report.render import PAGE, render

ABOUT: dict[str, Any] = {**describe_run(Path.cwd(), "python -m x", "quick"), "took_s": 1.0}


def figures(*rows: Row) -> Figures:
    return Figures({"b": Document("b", ABOUT, [dataclasses.asdict(row) for row in rows])})


COST = Row.of_costs("cost per chunk", 10.0, 25.0, "peer", 2.0, "us")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.03125, "0.0312"), (1.07, "1.07"), (32.29, "32.3"), (1148.46, "1,148"), (100.0, "100"), (2.0, "2.00"), (0, "0"),
     (None, "-"), (float("nan"), "-"), (93.75, "93.8"), (155399.9, "155,400")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_line_shows_both_sides_the_ratio_and_the_aim() -> None:
    line = figures(COST).line("a chunk", "b", "cost", "peer", with_floor=True, at_most=12)
    assert line == "| a chunk | 10 us | 25 us, peer | 2.00 us | 2.50 | at most 12 us |"


@pytest.mark.parametrize(
    ("aim", "is_missed"),
    [({"at_most": 9}, True), ({"at_most": 10}, False), ({"at_least": 11}, True), ({"ratio_at_least": 2.6}, True),
     ({"ratio_at_least": 2.5}, False), ({}, False)],
)  # fmt: skip
def test_an_aim_that_is_not_reached_is_remembered(aim: dict[str, Any], is_missed: bool) -> None:
    found = figures(COST)
    found.line("a chunk", "b", "cost", **aim)
    assert bool(found.misses) is is_missed


def test_what_was_not_measured_is_said_not_to_be() -> None:
    found = figures()
    assert UNMEASURED in found.line("a chunk", "b", "cost", at_most=1)
    assert not found.misses
    assert found.ours("b", "cost") == UNMEASURED
    assert found.get("elsewhere", "curves") is None


def test_the_page_renders_without_any_result() -> None:
    page = render({}, [])
    assert UNMEASURED in page
    assert "plots/" not in page


def test_the_page_renders_from_the_committed_results_and_its_plots_are_drawn(tmp_path: Path) -> None:
    documents = read_documents()
    drawn = draw_all(documents, tmp_path)
    assert set(drawn) <= set(PLOTS)
    page = render(documents, drawn)
    for name in re.findall(r"plots/(\w+)\.svg", page):
        assert (tmp_path / f"{name}.svg").stat().st_size < 300_000


def test_the_committed_page_is_what_the_results_give() -> None:
    documents = read_documents()
    drawn = [name for name in PLOTS if (PAGE.parent / "plots" / f"{name}.svg").exists()]
    assert PAGE.read_text() == render(documents, drawn), "run python -m benchmarks --report-only"


def test_benchmarks_are_chosen_by_name_and_group() -> None:
    assert [each.name for each in choose(["router.chunks"], Effort.QUICK)] == ["router.chunks"]
    assert len(choose(["router"], Effort.QUICK)) > 3
    assert choose([], Effort.FULL) == list(BENCHMARKS)
    with pytest.raises(ValueError, match=r"nothing\.here"):
        choose(["nothing.here"], Effort.QUICK)


@pytest.mark.parametrize(("full", "quick"), [(9, 2), (3, 2), (1, 1), (2, 2), (12, 3)])
def test_a_quick_run_repeats_a_quarter_as_often(full: int, quick: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounds(full) == full
    monkeypatch.setenv(VARIABLE, Effort.QUICK)
    assert rounds(full) == quick


def test_the_processor_is_read_from_linux(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Some  CPU @ 2 GHz\n")
    assert read_cpu_model(file) == "Some CPU @ 2 GHz"
    assert read_cpu_model(tmp_path / "none") == ""
