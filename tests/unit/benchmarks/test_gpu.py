"""What `make bench-gpu` would run: the commands and settings are checked here, where there is no GPU."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from serving.settings.stack import load_settings

CONFIG = Path("configs/h100.yaml")


def test_the_bare_server_has_the_arguments_of_a_replica() -> None:
    plan = gpu.build_plan(load_settings(CONFIG, {}), CONFIG, 9001)
    assert plan.checkpoint == "deepseek-ai/DeepSeek-OCR"
    for flag, value in (("--dtype", "bfloat16"), ("--max-num-seqs", "512"), ("--model", plan.checkpoint)):
        assert plan.bare[plan.bare.index(flag) + 1] == value
    assert "--no-enable-prefix-caching" in plan.bare
    assert plan.environment["VLLM_MEDIA_CONNECTOR"] == "serving"


def test_the_same_pages_are_asked_of_both_servers(tmp_path: Path) -> None:
    plan = gpu.build_plan(load_settings(CONFIG, {}), CONFIG, 9001)
    one, other = (gpu.build_vllm_bench(plan, f"http://{host}", 32, 512, tmp_path, "x") for host in ("a", "b"))
    assert [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]] == [("http://a", "http://b")]


@pytest.mark.slow  # it imports the whole of vLLM in a process of its own
def test_a_dry_run_passes_vllms_own_checks_and_prints_every_command() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--levels", "1,32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    benches = [line for line in done.stdout.splitlines() if line.startswith("vllm bench serve ")]
    assert [line[line.index("--max-concurrency") + 1] for line in map(shlex.split, benches)] == ["1", "32", "1", "32"]
    assert "are in order" in done.stdout
