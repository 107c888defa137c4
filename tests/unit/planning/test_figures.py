from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.paths import ROOT

from serving.errors import SettingsError
from serving.planning.figures import Basis, Figures, load_figures, weakest

FIGURES = json.loads((ROOT / "serving/planning/figures.json").read_text())


@pytest.mark.parametrize("figure", [figure for figure in FIGURES if "file" in figure], ids=lambda figure: figure["key"])
def test_measured_figures_are_those_of_the_benchmarks(figure: dict[str, object]) -> None:
    rows = json.loads((ROOT / str(figure["file"])).read_text())
    row = next(row for row in rows if row["measure"] == figure["measure"])
    assert figure["value"] == pytest.approx(row.get("ours", row.get("value")) * figure["scale"])
    assert figure["basis"] == "measured"


def test_every_figure_says_where_it_comes_from() -> None:
    assert all(figure["source"] and figure["basis"] in {str(basis) for basis in Basis} for figure in FIGURES)
    assert all("file" in figure for figure in FIGURES if figure["basis"] == "measured")


def test_what_is_given_takes_the_place_of_ours() -> None:
    figures = load_figures().with_values({"output_tokens": 700.0, "peak_to_mean": None})
    assert figures["output_tokens"].basis is Basis.GIVEN
    assert figures.value("output_tokens") == 700
    assert figures["peak_to_mean"].basis is Basis.ASSUMED


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonsense", 1.0),
        ("output_tokens", 0.0),
        ("output_tokens", float("nan")),
        ("cpu_utilisation", 1.5),
        ("gpus_per_node", -1),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: float) -> None:
    with pytest.raises(SettingsError, match=key):
        load_figures().with_values({key: value})


def test_a_file_of_figures(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    mine = {"key": "output_tokens", "value": 600, "unit": "tokens/page", "basis": "measured", "source": "our archive"}
    file.write_text(json.dumps([mine]))
    assert load_figures(file)["output_tokens"].source == "our archive"
    for text, reason in (
        ("{", "not JSON"),
        ("[{}]", "key"),
        (json.dumps([{**mine, "key": "x"}]), "no figure is called x"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=reason):
            load_figures(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_figures(tmp_path / "missing.json")


def test_a_result_is_as_good_as_the_worst_of_what_it_rests_on() -> None:
    assert weakest([Basis.MEASURED, Basis.ASSUMED, Basis.EXACT]) is Basis.ASSUMED
    assert weakest([Basis.GIVEN, Basis.MEASURED]) is Basis.MEASURED
    assert weakest([]) is Basis.EXACT
    assert len(Figures([])) == 0
