"""However a stack is ended, nothing of it is left shortly after, and none of it takes requests any more.

Two ends are proven on stacks that other tests have used: below, and in `test_keys_and_doors`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from e2e.conftest import ROOT
from e2e.endings import (
    CUT_SHORT,
    ENDED_WITHOUT_SUPERVISOR,
    ORDERLY,
    check_end,
    interrupt_group,
    kill_stack_process,
    kill_supervisor,
    signal_everything,
    signal_group,
)
from e2e.scripted_stack import ScriptedStack, build_scripted_stack, run_scripted_stack, wait_until

SCRIPT = {"output_tokens": 50, "tokens_per_s": 100}
ENDS = [
    pytest.param(signal_everything, 0, CUT_SHORT, id="everything", marks=pytest.mark.slow),
    pytest.param(kill_supervisor, -9, ENDED_WITHOUT_SUPERVISOR, id="supervisor", marks=pytest.mark.slow),
    pytest.param(signal_group, 0, ORDERLY, id="group", marks=pytest.mark.slow),
    pytest.param(interrupt_group, 0, ORDERLY, id="group-int", marks=pytest.mark.slow),
    pytest.param(
        kill_stack_process, 1, "the stack's process was ended by SIGKILL; ", id="stack", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("end", "status", "last_words"), ENDS)
def test_nothing_is_left(tmp_path: Path, end: Callable[[ScriptedStack], None], status: int, last_words: str) -> None:
    with run_scripted_stack(tmp_path, SCRIPT) as stack:
        check_end(stack, end, status, last_words)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("end", "status", "last_words"), [ENDS[0].values, ENDS[1].values])
def test_nothing_is_left_of_vllm_with_an_engine_process_of_its_own(
    tmp_path: Path, end: Callable[[ScriptedStack], None], status: int, last_words: str
) -> None:
    model = yaml.safe_load((ROOT / "configs/local.yaml").read_text())["models"]["nano"]
    model["env"]["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with run_scripted_stack(tmp_path, None, model=model) as stack:
        assert stack.find("EngineCore")
        check_end(stack, end, status, last_words)


def test_a_stop_before_it_is_ready_does_not_wait(tmp_path: Path) -> None:
    stack = build_scripted_stack(tmp_path, {**SCRIPT, "start_s": 600})
    stack.spawn()
    try:
        wait_until(lambda: bool(stack.find("ServeReplica:engine-m")), 120, "a replica starts")
        check_end(stack, interrupt_group, 130, "stopped before it was ready")
    finally:
        stack.stop()


def test_of_two_that_start_at_once_one_is_refused_and_of_the_other_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = build_scripted_stack(tmp_path, SCRIPT)
    stacks = (first, ScriptedStack(tmp_path / "other", first.settings, first.port))
    try:
        for stack in stacks:
            stack.spawn()
        wait_until(lambda: any(stack.running.poll() is not None for stack in stacks), 60, "one has ended")
        (refused,) = (stack for stack in stacks if stack.running.poll() is not None)
        (kept,) = (stack for stack in stacks if stack is not refused)
        assert refused.running.poll() == 1
        assert f"port {first.port} is taken by another `serving up`" in refused.log
        wait_until(lambda: "Ready on" in kept.log, 240, "the other one is ready")
        check_end(kept, signal_everything, 0, CUT_SHORT)
    finally:
        for stack in stacks:
            stack.stop()
