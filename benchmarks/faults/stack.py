"""A stack started by `serving up` for a benchmark or a test, and the processes that it is made of."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
import yaml

_READY_WITHIN_S = 400.0
_STOPPED_WITHIN_S = 90.0
_TITLES = {
    "replica": "ray::ServeReplica:engine-",
    "router": "ray::ServeReplica:router",
    "directory": "ray::ReplicaDirectory",
    "core": "VLLM::EngineCore",
}
"""How Ray names the processes of its actors, and vLLM the one that its replica's engine runs in, by our names."""


@dataclass
class RunningStack:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def find(self, part: str) -> list[psutil.Process]:
        """The processes of one part (`replica`, `router`, `directory`, `core`), oldest first."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith(_TITLES[part]) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def get(self, path: str) -> Any:
        """The JSON answer of one of the routers; raises OSError when there is none."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as answer:
            return orjson.loads(answer.read())

    def end_an_engine(self) -> int:
        """Kill vLLM's engine process of one replica; a scripted engine dies in the same way.

        What runs on it fails with it; the replica's own process, which holds the HTTP server, lives on. Gives the id of
        that process: it is to be replaced.
        """
        if cores := self.find("core"):
            replica_pid: int = cores[0].ppid()
            cores[0].kill()
            return replica_pid
        replica = next(entry for entry in self.get("/admin/state")["replicas"] if entry["state"] == "ready")
        body = orjson.dumps({"failures": ["dead:after_tokens=5:times=1"]})
        with urllib.request.urlopen(f"{replica['base_url']}/script", data=body, timeout=5) as answer:
            return int(orjson.loads(answer.read())["pid"])

    def num_ready(self) -> int:
        """Engine replicas that a router may use now; 0 while no router answers."""
        try:
            return sum(self.get("/ready")["replicas"].values())
        except OSError:
            return 0


@contextlib.contextmanager
def run_stack(settings: dict[str, Any], folder: Path, environ: dict[str, str] | None = None) -> Iterator[RunningStack]:
    """`serving up` with these settings until the context ends; everything that it started has ended then.

    Raises:
        RuntimeError: it did not come up; the message holds the end of its log.
    """
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    log = folder / "serving.log"
    command = [str(Path(sys.executable).with_name("serving")), "up", "--config", str(config)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **(environ or {})}
        )
    try:
        _wait_until_ready(process, log)
        yield RunningStack(process, f"http://127.0.0.1:{settings['router']['port']}", log)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while "Ready on" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the stack did not come up: {log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(_STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
