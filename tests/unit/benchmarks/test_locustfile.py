"""The locustfile under Locust itself, spread over two processes, against a scripted engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.load.arrivals import Shape, schedule
from benchmarks.router.servers import run_engine


def test_two_processes_share_one_schedule_and_put_together_what_they_saw(tmp_path: Path) -> None:
    failure = ("--failure", "status:503:every=9")
    with run_engine("--tokens-per-s", "500", "--output-tokens", "30", *failure) as engine:
        command = [sys.executable, "-m", "benchmarks.load", "--url", engine.url, "--seconds", "4", "--rate", "4"]
        command += ["--workers", "2", "--arrivals", "constant", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["processes"] == 2, done.stdout
    assert summary["visits"] == len(list(schedule(Shape.CONSTANT, 4, 4, seed=1)))
    assert summary["requests"] >= summary["visits"]
    assert summary["pages"] > 0
    assert summary["num_refused"] + summary["num_errors"] > 0, "what the engine refused is counted, and apart"
    assert summary["first_s"]["p50"] < 5
    assert summary["gap_s"]["p50"] < 1
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_nobody_at_an_address_is_told_with_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.load", "--url", "http://127.0.0.1:9", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "make serve" in done.stdout
