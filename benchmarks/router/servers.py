"""The servers under measure, each in processes of its own whose CPU time and memory can be read."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psutil

_READY_WITHIN_S = 300.0
_ENGINE = "serving.engine.scripted"
_GATEWAY = "benchmarks.router.gateway"
_PLAIN_PROXY = "benchmarks.router.plain_proxy"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. Processes are found anew at every look: they come and go."""

    url: str
    process: psutil.Process

    def cpu_s(self, *names: str) -> float:
        """CPU seconds so far of the process and its descendants; with names, of those whose command line has one, and
        of the descendants of these."""
        members = {self.process, *self.process.children(recursive=True)}
        if names:
            named = [member for member in members if _is_named(member, names)]
            members = {*named, *(child for member in named for child in _descendants(member))}
        return sum(map(_cpu_s, members))

    def memory_bytes(self) -> int:
        """Memory that is this process's alone."""
        return int(self.process.memory_full_info().uss)


def _is_named(process: psutil.Process, names: tuple[str, ...]) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        command = " ".join(process.cmdline())
        return any(name in command for name in names)
    return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    return []


def _cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def run_server(
    command: list[str],
    port: int,
    *,
    environment: Mapping[str, str] | None = None,
    ready_path: str = "/v1/models",
    ready_within_s: float = _READY_WITHIN_S,
) -> Iterator[Server]:
    """A server in processes of its own, ready (this path is answered 200) when this yields.

    Raises:
        RuntimeError: it ended or took too long; the end of its log is in the message.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=log, stderr=log)
        server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        family: list[psutil.Process] = [server.process]
        try:
            deadline_s = time.monotonic() + ready_within_s
            while not _is_ready(server.url + ready_path):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise RuntimeError(f"{command} did not start:\n{log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.1)
            yield server
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += server.process.children(recursive=True)
            process.terminate()
            for member in psutil.wait_procs(family, timeout=20)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def run_engine(*flags: str) -> contextlib.AbstractContextManager[Server]:
    """A scripted engine on its own: uvicorn, bare."""
    port = free_port()
    return run_server([sys.executable, "-m", _ENGINE, "--port", str(port), *flags], port)


def run_gateway(engine: Server) -> contextlib.AbstractContextManager[Server]:
    """One router process in front of an engine."""
    port = free_port()
    command = [sys.executable, "-m", _GATEWAY, "--port", str(port), "--engine", engine.url]
    return run_server(command, port)


def run_plain_proxy(library: str, engine: Server) -> contextlib.AbstractContextManager[Server]:
    """A proxy of the plainest kind in front of an engine."""
    port = free_port()
    command = [sys.executable, "-m", _PLAIN_PROXY, "--way", library, "--port", str(port), "--engine", engine.url]
    return run_server(command, port)
