"""However a stack is ended, nothing of it is left shortly after, and none of it takes requests any more."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from e2e.conftest import ROOT
from e2e.scripted_stack import ScriptedStack, build_scripted_stack, run_scripted_stack, wait_until

WITHIN_S = 15
SCRIPT = {"output_tokens": 50, "tokens_per_s": 100}


def signal_group(stack: ScriptedStack) -> None:
    """A shell's, or a supervisor like runit's or supervisord's."""
    os.killpg(stack.running.pid, signal.SIGTERM)


def interrupt_group(stack: ScriptedStack) -> None:
    os.killpg(stack.running.pid, signal.SIGINT)


def signal_everything(stack: ScriptedStack) -> None:
    """Systemd's `KillMode=control-group`, its default."""
    for process in [psutil.Process(stack.running.pid), *stack.descendants()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()


def kill_supervisor(stack: ScriptedStack) -> None:
    stack.running.kill()


def kill_stack_process(stack: ScriptedStack) -> None:
    (child,) = psutil.Process(stack.running.pid).children()
    child.kill()


ORDERLY = "stopped"
CUT_SHORT = "stopped, not in order: Ray's processes were ended too, so requests that ran were cut off"
ENDS = [
    pytest.param(signal_everything, 0, CUT_SHORT, id="everything"),
    pytest.param(kill_supervisor, -9, "stopped, since the process that supervised it has died", id="supervisor"),
    pytest.param(signal_group, 0, ORDERLY, id="group", marks=pytest.mark.slow),
    pytest.param(interrupt_group, 0, ORDERLY, id="group-int", marks=pytest.mark.slow),
    pytest.param(
        kill_stack_process, 1, "the stack's process was ended by SIGKILL; ", id="stack", marks=pytest.mark.slow
    ),
]


def check_end(stack: ScriptedStack, end: Callable[[ScriptedStack], None], status: int, last_words: str) -> None:
    everything = [psutil.Process(stack.running.pid), *stack.descendants()]
    end(stack)
    started_s = time.monotonic()
    assert stack.running.wait(WITHIN_S) == status
    psutil.wait_procs(everything, timeout=WITHIN_S - (time.monotonic() - started_s))
    alive = [process for process in everything if process.is_running()]
    assert not alive, alive
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{stack.url}/ready", timeout=5)
    assert stack.log.rstrip("\n").rpartition("\n")[2].startswith(last_words), stack.log[-2000:]
    print(f"nothing left after {time.monotonic() - started_s:.1f} s")


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


def test_of_two_that_start_at_once_one_is_refused(tmp_path: Path) -> None:
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
    finally:
        for stack in stacks:
            stack.stop()
