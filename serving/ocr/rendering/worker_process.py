"""The parent's side of a rendering process: its start, its pipes and its limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import resource
import signal
import sys
from typing import Any

import psutil

_LINE_BYTES = 2**20
_START_CPU_S = 2
"""CPU seconds for a worker's startup, in addition to those of its first request."""
_DEATH_S = 5.0
"""How long a worker process may take to end after its pipes have closed."""
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
"""Environment variables that workers inherit; the service's others may be secrets."""
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""Keeps numpy from reserving part of a worker's limited memory for each core of the machine."""


class RenderWorker:
    """A worker process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.num_requests = 0
        self.is_healthy = False
        self._seen_cpu_s = 0.0
        self._reported_cpu_s = 0.0
        """CPU seconds that `measure_cpu_s` has reported."""
        self._bound_cpu_s = 0
        """CPU seconds after which the kernel kills the process."""

    @classmethod
    async def start(cls, memory_bytes: int) -> RenderWorker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", "serving.ocr.rendering.worker", str(memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_BYTES,
            env=_ONE_THREAD | {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the service, which stops its workers itself
        )
        return cls(process)

    async def ask(self, request: dict[str, Any], max_cpu_s: int) -> tuple[dict[str, Any], bytes]:
        """Send a request and return the answer with its image.

        Args:
            request: see `serving.ocr.rendering.worker`.
            max_cpu_s: CPU seconds after which the kernel kills the worker, give or take one second.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.num_requests += 1
        self._limit_cpu(max_cpu_s)
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        await self.process.stdin.drain()
        line = await self.process.stdout.readuntil(b"\n")
        answer = json.loads(line)
        return answer, await self.process.stdout.readexactly(answer.get("size_bytes", 0))

    def measure_cpu_s(self) -> float:
        """CPU seconds since the last call, or since the process started."""
        used_cpu_s = self._read_cpu_s()
        since_cpu_s = used_cpu_s - self._reported_cpu_s
        self._reported_cpu_s = used_cpu_s
        return since_cpu_s

    async def has_used_up_its_time(self) -> bool:
        """Whether the kernel has killed the worker because its request exceeded the CPU time."""
        self._read_cpu_s()
        try:
            async with asyncio.timeout(_DEATH_S):
                return await self.process.wait() == -signal.SIGXCPU
        except TimeoutError:  # it has closed its pipes but is alive
            return False

    def _limit_cpu(self, max_cpu_s: int) -> None:
        """Set the kernel's limit, which counts whole seconds since the process started."""
        if self.num_requests == 1:
            max_cpu_s += _START_CPU_S
        self._bound_cpu_s = math.ceil(self._read_cpu_s()) + max_cpu_s
        if self.process.returncode is None:  # otherwise its pid may belong to another process
            resource.prlimit(self.process.pid, resource.RLIMIT_CPU, (self._bound_cpu_s, resource.RLIM_INFINITY))

    def _read_cpu_s(self) -> float:
        """CPU seconds of the process so far.

        For a process that has ended: its limit if that is why it was killed, or else the last measurement.
        """
        if self.process.returncode == -signal.SIGXCPU:
            self._seen_cpu_s = float(self._bound_cpu_s)
        elif self.process.returncode is None:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(self.process.pid).cpu_times()
                self._seen_cpu_s = float(times.user + times.system)
        return self._seen_cpu_s

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self.process.wait()
