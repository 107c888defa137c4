"""The regression check: ratios only, each with a tolerance, nothing missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.check import BASELINE, TOLERANCE, Verdict, app, compare, find_ratios, find_tolerance, is_good
from benchmarks.documents import RESULTS, Document, read_documents, write_document
from benchmarks.fastpath.rows import Row


def document(ours: float, peer: float, name: str = "router.chunks") -> Document:
    row = Row.of_costs("CPU per chunk", ours, peer, "HAProxy", None, "us")
    fields = {field: getattr(row, field) for field in row.__slots__}
    return Document(name, {"date": "today"}, [fields])


def ratios(ours: float, peer: float) -> dict[str, float]:
    return find_ratios({"router.chunks": document(ours, peer)})


@pytest.mark.parametrize(
    ("now", "verdict"), [(1.0, Verdict.KEPT), (0.66, Verdict.KEPT), (0.64, Verdict.WORSE), (1.5, Verdict.BETTER)]
)
def test_a_ratio_may_fall_by_its_tolerance(now: float, verdict: Verdict) -> None:
    assert TOLERANCE == 0.35
    (line,) = compare({"x": 1.0}, {"x": now})
    assert line.verdict is verdict
    assert is_good([line]) is (verdict is not Verdict.WORSE)


def test_a_slower_machine_is_no_regression() -> None:
    (line,) = compare(ratios(10, 20), ratios(100, 200))
    assert line.verdict is Verdict.KEPT


def test_a_missing_ratio_is_bad_and_a_new_one_is_not() -> None:
    lines = compare({"old": 1.0}, {"new": 1.0})
    assert [line.verdict for line in lines] == [Verdict.MISSING, Verdict.NEW]
    assert not is_good(lines)
    assert is_good(compare({}, {"new": 1.0}))


def test_the_longest_beginning_gives_the_tolerance() -> None:
    assert find_tolerance("balance_sim: p99 wait") == 0.01
    assert find_tolerance("fastpath.images: page") == TOLERANCE
    assert find_tolerance("fastpath.images: bytes to the engine") == 0.01


def test_the_command_accepts_compares_and_refuses(tmp_path: Path) -> None:
    results, baseline = tmp_path / "results", tmp_path / "baseline.json"
    arguments = ["--results", str(results), "--baseline", str(baseline)]
    write_document(document(10, 20), results)
    run = CliRunner().invoke
    assert run(app, [*arguments, "--accept"]).exit_code == 0
    assert list(json.loads(baseline.read_text()).values()) == [2.0]
    write_document(document(1000, 1900), results)
    assert run(app, arguments).exit_code == 0
    write_document(document(20, 20), results)
    worse = run(app, arguments)
    assert worse.exit_code == 1
    assert "worse" in worse.output


def test_the_committed_baseline_is_of_benchmarks_that_there_are() -> None:
    documents = read_documents(RESULTS)
    names = {name.partition(": ")[0] for name in json.loads(BASELINE.read_text())}
    assert names
    assert names <= documents.keys()


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "somebody_elses.json").write_text("[]")
    assert read_documents(tmp_path) == {}
    (tmp_path / "ledger.json").write_text("[]")
    with pytest.raises(ValueError, match=r"ledger\.json"):
        read_documents(tmp_path)
