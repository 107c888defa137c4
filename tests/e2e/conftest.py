"""The real stack, started once per run through the command that a user types."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from support.collector import Collector, run_collector
from support.paths import ROOT

READY_WITHIN_S = 420
STOPPED_WITHIN_S = 60


@dataclass
class Stack:
    """A running `make serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def engine_url(self) -> str:
        """Where the engine replica listens, as the command tells its user."""
        found = re.search(r"nano at (http://[\w.:]+)", self.log.read_text())
        assert found
        return found[1]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def metric(self, name: str) -> float:
        """The sum of a metric of vLLM's over its labels."""
        with urllib.request.urlopen(f"{self.engine_url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert values, f"vLLM has no metric {name}"
        return sum(values)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(stack: Stack) -> int:
    """Ctrl-C: SIGINT to the whole foreground group. Returns the exit status."""
    os.killpg(stack.process.pid, signal.SIGINT)
    return stack.process.wait(STOPPED_WITHIN_S)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Takes the traces of the stack that most tests share."""
    with run_collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    """The stack of the shipped settings, which most tests share.

    Its limits are small where a test would otherwise need large requests. `test_lifecycle` ends it, as the last test.
    """
    small = {
        "SERVING__TELEMETRY__OTLP_ENDPOINT": collector.url,
        "SERVING__BILLING__REPLICA_HOUR_DOLLARS__NANO": "0.5",
        "SERVING__ROUTER__LIMITS__MAX_IMAGE_PIXELS": "4000000",
        "SERVING__ROUTER__LIMITS__MAX_BODY_BYTES": "8000000",
    }
    port, log = free_port(), tmp_path_factory.mktemp("stack") / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["make", "serve", f"PORT={port}"],
            cwd=ROOT,
            env={**os.environ, **small},
            stdout=out,
            stderr=out,
            start_new_session=True,  # so that a signal to the group is what Ctrl-C is in a terminal
        )
    stack = Stack(process, f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while "Ready on" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield stack
    finally:
        if process.poll() is None:
            stop(stack)


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """The official client, as a user makes it."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client
