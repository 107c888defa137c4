from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli.main import app

RUNNER = CliRunner()
CURVE = {
    "base_s": 0.005,
    "per_seq_s": 0.0001,
    "prefill_s": 0.01,
    "overhead_s": 0.05,
    "max_seqs": 256,
    "kv_tokens": 400000,
}


@pytest.fixture
def curve(tmp_path: Path) -> str:
    file = tmp_path / "curve.json"
    file.write_text(json.dumps({"curve": CURVE, "source": "one A100 of ours"}))
    return str(file)


def test_json_holds_every_number_and_its_source(curve: str) -> None:
    result = RUNNER.invoke(
        app, ["plan", "--pages-per-day", "33e6", "--mode", "base", "--slo-p95", "120s", "--curve", curve, "--json"]
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    names = {figure["key"] for figure in told["figures"]} | {line["key"] for line in told["results"]}
    assert all(set(line["rests_on"]) <= names for line in told["results"])
    assert any("one A100 of ours" in figure["source"] for figure in told["figures"])
    assert {row["key"] for row in told["variations"]} == {"output_tokens", "output_spread"}


def test_the_table_marks_what_is_extrapolated(curve: str) -> None:
    arguments = ["plan", "--pages-per-day", "1e6", "--slo-p95", "120s", "--curve", curve, "--no-varies"]
    result = RUNNER.invoke(app, [*arguments, "--set", "gpus_per_node=4"], env={"COLUMNS": "220"})
    assert result.exit_code == 0, result.output
    assert "1,000,000 pages a day in base mode, p95 within 120 s" in result.stdout
    assert "your own" in result.stdout
    assert "~" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--slo-p95", "soon"], "is not a time"),
        (["--set", "output_tokens"], "NAME=NUMBER"),
        (["--set", "nonsense=1"], "no figure is called nonsense"),
        (["--daily-curve", "1,x"], "numbers between commas"),
        (["--curve", "/nowhere.json"], "is no curve"),
        (["--figures", "/nowhere.json"], "cannot be read"),
        (["--slo-p95", "1s"], "alone on their replica"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], reason: str) -> None:
    result = RUNNER.invoke(app, ["plan", "--pages-per-day", "33e6", *arguments])
    assert result.exit_code == 2
    assert reason in result.output
    assert "Traceback" not in result.output


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    result = RUNNER.invoke(app, ["plan", "--pages-per-day", "1000"])
    assert result.exit_code == 2
    assert "pip install 'serving[plan]'" in result.output
