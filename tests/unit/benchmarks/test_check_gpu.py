"""`make check-gpu` without a GPU: its steps' own rules, and a whole dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.check_gpu import (
    STEPS,
    Bench,
    CheckError,
    check_driver,
    check_files,
    check_guard,
    find_checkpoint,
    run_steps,
)
from benchmarks.stand_in import SMALL, Choices, write_documents


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_documents(tmp_path, Choices()), SMALL, torch.device("cpu"), "float32", is_dry=True)


def test_a_failed_step_hides_no_other(bench: Bench) -> None:
    def refuse(_: Bench) -> str:
        raise CheckError("bans differ")

    def break_down(_: Bench) -> str:
        raise RuntimeError("out of memory")

    run_steps(bench, {"good": lambda _: "fine", "bad": refuse, "broken": break_down, "last": lambda _: "too"})
    assert [(outcome.step, outcome.is_good) for outcome in bench.outcomes] == [
        *(("good", True), ("bad", False), ("broken", False), ("last", True))
    ]
    assert [outcome.detail for outcome in bench.outcomes][1:3] == ["bans differ", "RuntimeError: out of memory"]


def test_an_old_driver_fails() -> None:
    check_driver("580.65.06")
    with pytest.raises(CheckError, match=r"535\.183\.01 is older than 580"):
        check_driver("535.183.01")


def test_files_and_ids_are_told(bench: Bench) -> None:
    told = check_files(bench)
    assert "<td>" in told
    assert "special" in told
    assert "processor_config.json" in told
    tokenizer = bench.checkpoint / "tokenizer.json"
    tokenizer.write_text(json.dumps({"added_tokens": []}))
    with pytest.raises(CheckError, match="no token <image>"):
        check_files(bench)


def test_the_guard_is_held_against_the_rule(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "batches of 256 equal" in check_guard(bench)
    monkeypatch.setattr("serving.plugin.repetition.ngram_guard.ban_repeats", lambda *_: None)
    with pytest.raises(CheckError, match="bans differ from the rule's"):
        check_guard(bench)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path), "main") == tmp_path


@pytest.mark.slow  # it imports vLLM in a process of its own and encodes pages: half a minute
def test_a_dry_run_runs_every_step(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.check_gpu", "--dry-run", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert result["is_good"]
    assert [step["step"] for step in result["steps"]] == [*STEPS]
