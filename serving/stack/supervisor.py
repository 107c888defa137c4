"""The two processes behind `serving up`, which guarantee that nothing they started outlives them.

The supervisor is the process that the user or the service manager started. It waits, forwards signals and cleans up.
Its child runs the stack. The child uses Ray, so it may hang or be aborted by Ray's C++ code. Each cleans up after the
other:

- Both adopt orphans (`PR_SET_CHILD_SUBREAPER`, Linux): an engine whose replica was killed becomes a child of the stack
  process, or of the supervisor when that has ended too, instead of escaping to init.
- The stack process and all its descendants are in a session of their own. A signal to the process group of the terminal
  or the service manager reaches only the supervisor, so Ray is still running while the stack stops in order.
- The kernel notifies the stack process when its supervisor has died (`PR_SET_PDEATHSIG`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOP = (signal.SIGINT, signal.SIGTERM)
# Sent by the supervisor to the stack process, which a service manager may send the other signals at the same time.
_ASK_STOP, _ASK_URGENT_STOP, _ASK_RELOAD = signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
_WATCHED = frozenset({*_STOP, signal.SIGHUP, signal.SIGCHLD})
_MASKED = _WATCHED | {_ASK_STOP, _ASK_URGENT_STOP}
_POLL_S = 0.5
_FLAG_POLL_S = 0.05
_SWEEP_S = 5.0


class Flag:
    """A flag for signal handlers to set. `threading.Event` takes a lock, which the interrupted code may already
    hold."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Wait until the flag is set, for at most `timeout_s`, and return whether it is. Polls every 50 ms."""
        deadline_s = time.monotonic() + timeout_s
        while not self._is_set and (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(_FLAG_POLL_S, left_s))
        return self._is_set


@dataclass(slots=True)
class SignalRequests:
    """What signals have asked the stack process to do."""

    stop: Flag = field(default_factory=Flag)
    urgent: Flag = field(default_factory=Flag)
    """Stop without waiting for running requests: a second signal arrived, or the supervisor has died."""
    reload: Flag = field(default_factory=Flag)
    supervisor_pid: int = field(default_factory=os.getppid)

    def listen(self) -> None:
        """Install the signal handlers. Call it again after `ray.init`, which installs its own SIGTERM handler."""
        for number in (*_STOP, _ASK_STOP):
            signal.signal(number, lambda *_: self.stop.set())
        signal.signal(_ASK_URGENT_STOP, lambda *_: self._stop_at_once())
        signal.signal(_ASK_RELOAD, lambda *_: self.reload.set())

    def _stop_at_once(self) -> None:
        self.urgent.set()
        self.stop.set()

    @property
    def is_orphaned(self) -> bool:
        """Whether the supervisor has died."""
        return os.getppid() != self.supervisor_pid


def supervise(
    run: Callable[[SignalRequests], int], tell_death: Callable[[str, int], None], urgent_s: float = 8.0
) -> int:
    """Run the stack in a child process, and end every process that it leaves behind.

    Call it before any thread is started: the process forks.

    Args:
        run: runs the stack until a signal asks it to stop, and returns the exit status.
        tell_death: called after the clean-up if the stack process was killed, with the name of the signal and the
            number of processes that it left behind.
        urgent_s: how long the stack process may take after a second request to stop, before it is killed.

    Returns:
        The exit status: that of `run`, or 1 if its process was killed.
    """
    adopt_orphans()
    has_terminal = sys.stdout.isatty()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _MASKED)
    supervisor_pid = os.getpid()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run_child(run, supervisor_pid, mask)
    try:
        status = _wait(pid, has_terminal, urgent_s)
        num_killed = end_descendants(0.0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if status < 0:
        tell_death(signal.Signals(-status).name, num_killed)
        return 1
    return status


def _run_child(run: Callable[[SignalRequests], int], supervisor_pid: int, mask: Collection[int]) -> None:
    """Run the child process; does not return."""
    status = 1
    try:
        os.setsid()
        adopt_orphans()
        _prctl(_PR_SET_PDEATHSIG, _ASK_URGENT_STOP)
        requests = SignalRequests(supervisor_pid=supervisor_pid)
        requests.listen()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if requests.is_orphaned:  # the supervisor died before the kernel was asked to notify
            return
        status = run(requests)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  # the process ends here, whatever it was
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # exit handlers are skipped: Ray's would wait for a cluster that may have died


def _wait(pid: int, has_terminal: bool, urgent_s: float) -> int:
    """Forward signals until the stack process ends. Return its exit status, or minus the signal that ended it."""
    num_stops, kill_at_s = 0, float("inf")
    while True:
        info = signal.sigtimedwait(_WATCHED, _POLL_S)
        number = info.si_signo if info is not None else 0
        status = _reap(pid)
        if status is not None:
            return status
        if number == signal.SIGHUP and not (has_terminal and not _has_terminal()):
            os.kill(pid, _ASK_RELOAD)
        elif number == signal.SIGHUP or number in _STOP:
            num_stops += 1
            os.kill(pid, _ASK_STOP if num_stops == 1 else _ASK_URGENT_STOP)
            if num_stops == 2:
                kill_at_s = time.monotonic() + urgent_s
        if time.monotonic() > kill_at_s:
            os.kill(pid, signal.SIGKILL)


def _reap(pid: int) -> int | None:
    """Collect all children that have ended. Return the status of `pid` if it is among them."""
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if not ended:
            return None
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def _has_terminal() -> bool:
    try:
        return os.tcgetpgrp(sys.stdout.fileno()) >= 0
    except OSError:
        return False


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has died.

    Raises:
        OSError: the kernel does not support it; Linux does since 3.4.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def reap_adopted(own: Collection[int]) -> None:
    """Collect the exit statuses of adopted orphans, which would otherwise remain as zombies.

    Args:
        own: children that this process started itself; the code that started them waits for them.
    """
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def end_descendants(grace_s: float) -> int:
    """Wait up to `grace_s` for all descendants to end, then kill them. Return how many had to be killed.

    The caller must adopt orphans: children of a killed process are looked for again until none is left.
    """
    _, alive = psutil.wait_procs(_descendants(), timeout=grace_s)
    killed: set[int] = set()
    deadline_s = time.monotonic() + _SWEEP_S
    while (alive := _descendants()) and time.monotonic() < deadline_s:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed.add(process.pid)
        psutil.wait_procs(alive, timeout=_POLL_S)
    return len(killed)


def _descendants() -> list[psutil.Process]:
    """Return the processes that are still running, and collect the zombies that no other code waits for."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return found
