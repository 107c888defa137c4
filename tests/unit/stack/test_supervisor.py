"""Two real processes and what they start, without Ray: whoever is ended, nothing is left."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

WITHIN_S = 15

# The stack process starts a child, which starts a grandchild in a session of its own: both ignore polite signals.
SCRIPT = """
import signal, subprocess, sys, time
from serving.stack.supervisor import end_descendants, reap_adopted, supervise

STUBBORN = '''
import signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
print("started", flush=True)
time.sleep(600)
'''

def run(requests):
    child = subprocess.Popen([sys.executable, "-c", STUBBORN, STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    child.stdout.readline()
    print("ready", flush=True)
    while not requests.stop.wait(0.05):
        reap_adopted([child.pid])
        if requests.reload.is_set():
            requests.reload.clear()
            print("reload", flush=True)
    if {waits} and not requests.urgent.wait(60):
        return 9
    if requests.is_orphaned:
        end_descendants(0.0)
    print("urgent" if requests.urgent.is_set() else "in order", flush=True)
    return 7

status = supervise(run, lambda name, num_killed: print("killed by", name, num_killed, flush=True), 1.0)
print("status", status, flush=True)
sys.exit(status)
"""


class Run:
    """The script under way."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        wait_until(lambda: "ready" in self.said)
        self.all = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(self.all) == 4

    @property
    def said(self) -> list[str]:
        return self._log.read_text().split("\n")[:-1]

    @property
    def stack_process(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def wait(self) -> int:
        """The exit status, when nothing is left."""
        status = self.process.wait(WITHIN_S)
        _, alive = psutil.wait_procs(self.all, timeout=WITHIN_S)
        assert not alive, alive
        return status


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[subprocess.Popen[str]] = []

    def start(*, waits: bool = False, terminal: int | None = None) -> Run:
        log = tmp_path / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT.replace("{waits}", str(waits))],
                stdin=terminal,
                stdout=out if terminal is None else terminal,
                stderr=out,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return Run(process, log)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_stops_the_stack_once_and_in_order(
    start: Callable[..., Run], number: signal.Signals
) -> None:
    run = start()
    os.killpg(run.process.pid, number)
    assert run.wait() == 7
    assert run.said == ["ready", "in order", "status 7"]


def test_a_signal_to_every_process_at_once_still_leaves_nothing(start: Callable[..., Run]) -> None:
    run = start()
    for process in run.all:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    assert run.wait() == 7
    assert "in order" in run.said, "the stack process was told twice, which is not a second request"


def test_a_second_signal_is_urgent(start: Callable[..., Run]) -> None:
    run = start(waits=True)
    run.process.terminate()
    time.sleep(0.3)  # nothing can be seen of it: the stack waits
    assert run.process.poll() is None
    run.process.terminate()
    assert run.wait() == 7
    assert "urgent" in run.said


def test_a_stack_process_that_hangs_is_killed_after_the_second_signal(start: Callable[..., Run]) -> None:
    run = start()
    run.stack_process.suspend()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # else the kernel makes one of two equal signals
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 1
    assert "killed by SIGKILL 2" in run.said


def test_a_killed_stack_process_leaves_nothing(start: Callable[..., Run]) -> None:
    run = start()
    run.stack_process.kill()
    assert run.wait() == 1
    assert run.said == ["ready", "killed by SIGKILL 2", "status 1"]


def test_a_killed_supervisor_leaves_nothing(start: Callable[..., Run]) -> None:
    run = start(waits=True)
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    assert run.said == ["ready", "urgent"]


def test_a_hang_up_without_a_terminal_asks_for_a_reload(start: Callable[..., Run]) -> None:
    run = start()
    run.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload" in run.said)
    run.process.terminate()
    assert run.wait() == 7


def test_a_closed_terminal_stops_the_stack(tmp_path: Path) -> None:
    """The terminal's own: the supervisor leads its session, as a login shell's child would be in its group."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT.replace("{waits}", "False")])
    output = b""
    while b"ready" not in output:
        output += os.read(terminal, 100)
    everything = psutil.Process(pid).children(recursive=True)
    assert len(everything) == 3
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(everything, timeout=WITHIN_S)
    assert not alive
    assert os.WIFEXITED(status)


def test_orphans_do_not_stay_as_zombies(start: Callable[..., Run]) -> None:
    run = start()
    child, grandchild = run.stack_process.children(recursive=True)
    assert child.ppid() == grandchild.parents()[1].pid == run.stack_process.pid
    child.kill()
    wait_until(lambda: grandchild.ppid() == run.stack_process.pid)
    grandchild.kill()
    # The child is for whoever started it, who does not ask here; the grandchild is nobody's.
    wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
    run.process.terminate()
    assert run.wait() == 7


def test_signals_that_interrupt_each_other_do_not_lock_up() -> None:
    """A service manager's SIGTERM and the supervisor's word come at once; a lock in a handler would be taken twice."""
    code = """
import os, signal, threading
from serving.stack.supervisor import SignalRequests
requests = SignalRequests()
requests.listen()
def send():
    for _ in range(20_000):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
sender = threading.Thread(target=send)
sender.start()
while sender.is_alive():
    requests.stop.clear()
    requests.stop.wait(0.0001)
print("through")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "through\n"
