"""Ways to end a stack, and what must be left of it: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import psutil
import pytest

from e2e.scripted_stack import ScriptedStack

WITHIN_S = 15


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
ENDED_WITHOUT_SUPERVISOR = "stopped, since the process that supervised it has died"


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
