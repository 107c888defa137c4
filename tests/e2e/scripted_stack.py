"""A stack of scripted engines, started through the command that a user types, and clients that keep it busy."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from e2e.conftest import ROOT, free_port

SERVING = ROOT / ".venv/bin/serving"
_READY_WITHIN_S = 240
_STOPPED_WITHIN_S = 90


@dataclass
class ScriptedStack:
    """A `serving up` with a settings file of its own."""

    folder: Path
    settings: dict[str, Any]
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.folder / "settings.yaml"

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self, **model: Any) -> None:
        """Put the settings into the file, with changes to the model's."""
        self.settings["models"]["m"] |= model
        self.config.write_text(yaml.safe_dump(self.settings))

    def spawn(self) -> None:
        """Start it without waiting for anything."""
        self.write()
        with (self.folder / "serve.log").open("wb") as out:
            self.process = subprocess.Popen(
                [SERVING, "up", "--config", self.config], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
            )

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.spawn()
        wait_until(lambda: "Ready on" in self.log or self.running.poll() is not None, _READY_WITHIN_S, "it was ready")
        assert self.running.poll() is None, self.log

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def engines(self) -> list[str]:
        """Where the replicas that were there at the start listen."""
        return re.findall(r"m at (http://[\w.:]+)", self.log)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command of ours, in another terminal."""
        return subprocess.run(
            [SERVING, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=_STOPPED_WITHIN_S, check=False
        )

    def descendants(self) -> list[psutil.Process]:
        """Those that live at this moment."""
        found = []
        for process in psutil.Process(self.running.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends while it is looked at
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def find(self, name: str) -> list[psutil.Process]:
        found = []
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join((process.name(), *process.cmdline())):
                    found.append(process)
        return found

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(_STOPPED_WITHIN_S)


@contextlib.contextmanager
def run_scripted_stack(folder: Path, script: Mapping[str, Any] | None, **sections: Any) -> Iterator[ScriptedStack]:
    """One model `m` of scripted engines, ready; stopped with the context. `sections` are merged into the settings."""
    stack = build_scripted_stack(folder, script, **sections)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


def build_scripted_stack(folder: Path, script: Mapping[str, Any] | None, **sections: Any) -> ScriptedStack:
    """The same, not started.

    Without a script the model's section must say what vLLM runs.
    """
    port = free_port()
    settings: dict[str, Any] = {
        "models": {"m": {"checkpoint": "scripted", "cpus_per_replica": 0.1}},
        "router": {"port": port, "cpus_per_replica": 0.1, "report_s": 0.25},
        "engine": {"heartbeat_s": 0.5, "lease_s": 5, "drain_s": 20},
    }
    if script is not None:
        settings["models"]["m"]["script"] = dict(script)
    for name, section in sections.items():
        (settings["models"]["m"] if name == "model" else settings.setdefault(name, {})).update(section)
    return ScriptedStack(folder, settings, port)


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


@dataclass
class Clients:
    """Clients that each ask, wait for the whole answer, and ask again: every other one for a stream. One that is told
    that the stack shuts down goes home."""

    url: str
    num_clients: int
    max_tokens: int
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    _is_over: bool = False

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[Clients]:
        """Leaving the context lets each finish what it has asked for."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
            asking = [asyncio.create_task(self._ask_on(session, bool(n % 2))) for n in range(self.num_clients)]
            try:
                yield self
            finally:
                self.end()
                await asyncio.gather(*asking)

    def end(self) -> None:
        """No client asks again."""
        self._is_over = True

    async def _ask_on(self, session: aiohttp.ClientSession, is_stream: bool) -> None:
        body = {"model": "m", "max_tokens": self.max_tokens, "stream": is_stream}
        body |= {"messages": [{"role": "user", "content": "Hello"}]}
        while not self._is_over:
            try:
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
                    text = await answer.text()
                if answer.status == 503 and '"shutting_down"' in text:
                    return
                is_whole = answer.status == 200 and (text.endswith("data: [DONE]\n\n") or not is_stream)
                if not is_whole:
                    self.failures.append(f"stream {is_stream}: {answer.status} {text[-300:]}")
            except (aiohttp.ClientError, TimeoutError) as error:
                self.failures.append(f"stream {is_stream}: {error!r}")
            self.num_done += 1


async def ready_replicas(stack: ScriptedStack) -> int:
    """How many replicas the router may send to; -1 when it was one that is leaving."""
    async with aiohttp.ClientSession() as session, session.get(f"{stack.url}/ready") as answer:
        found = await answer.json()
    return -1 if "replicas" not in found else int(found["replicas"]["m"])


async def wait_for_replicas(stack: ScriptedStack, number: int, timeout_s: float) -> float:
    """Seconds until so many replicas were ready."""
    started_s = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while True:
            if await ready_replicas(stack) == number:
                return time.monotonic() - started_s
            await asyncio.sleep(0.1)
