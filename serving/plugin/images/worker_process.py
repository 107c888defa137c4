"""The parent's side of one image worker: starts the process, sends jobs, receives pixels, ends it."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path

import torch

import serving
from serving.plugin.images.decoding import DecodeError
from serving.plugin.images.page_views import PageViews
from serving.plugin.images.views import Layout
from serving.plugin.images.worker_messages import Done, Ready, Refused, ViewJob

_EXIT_TIMEOUT_S = 2.0
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
"""Keeps up to 256 MiB of freed memory: page faults for new arrays are a quarter of the work on an A4 page."""


class WorkerStartError(Exception):
    """The process could not be started, or ended or hung before it was ready. No page is the cause."""


class WorkerLostError(Exception):
    """The worker died during a job, or could not receive it."""


class WorkerHungError(Exception):
    """The worker did not answer in time."""


class WorkerProcess:
    """One process and memory that both sides map. Use it from one thread at a time, except `kill`.

    The memory is anonymous (memfd): no file in /dev/shm can be left behind, a container's limit on /dev/shm does not
    apply, and the memory is freed with the last process that maps it.
    """

    def __init__(self) -> None:
        """Start the process. Call `wait_until_ready` before anything else.

        Raises:
            WorkerStartError: the system cannot start another process.
        """
        self._memory: mmap.mmap | None = None
        self._is_lost = False
        self.is_ready = False
        try:
            self._start()
        except OSError as error:
            raise WorkerStartError(str(error)) from error

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._memory_fd = os.memfd_create("serving-image-views")
        command = [sys.executable, "-m", "serving.plugin.images.worker", str(theirs.fileno()), str(self._memory_fd)]
        # multiprocessing's spawn is not used: its children import the parent's main module, which is all of vLLM.
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), self._memory_fd), env=_environment()
                )
            except OSError:
                os.close(self._memory_fd)
                raise

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the process has imported everything.

        Raises:
            WorkerStartError: the process ended, or took too long and was killed.
        """
        try:
            self.is_ready = self._connection.poll(timeout_s) and isinstance(self._connection.recv(), Ready)
        except (EOFError, OSError):
            self.is_ready = False
        if not self.is_ready:
            self.kill()
            raise WorkerStartError(f"it ended or was not ready within {timeout_s:.0f} s; its own output says why")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._is_lost and self._process.poll() is None

    def run(self, job: ViewJob, data: bytes, timeout_s: float) -> tuple[PageViews, float]:
        """Run a job. Return a copy of the views and the seconds that the worker took.

        Raises:
            DecodeError: the file is invalid.
            WorkerLostError: the process died; another one may succeed.
            WorkerHungError: the process took too long and was killed.
        """
        layout = Layout.of(job.size, job.mode)
        try:
            answer = self._ask(replace(job, memory_bytes=self._reserve(layout.size_bytes)), data, timeout_s)
        except (EOFError, OSError) as error:
            self.kill()
            raise WorkerLostError from error
        if answer is None:
            self.kill()
            raise WorkerHungError
        if isinstance(answer, Refused):
            raise DecodeError(answer.reason)
        # One copy, so that the shared memory can be reused immediately: a request keeps its pixels until it is
        # answered.
        shared = torch.frombuffer(self._memory, dtype=torch.uint8, count=layout.size_bytes)
        return PageViews.in_buffer(shared.clone(), layout), answer.seconds

    def _ask(self, job: ViewJob, data: bytes, timeout_s: float) -> Done | Refused | None:
        self._connection.send(job)
        self._connection.send_bytes(data)
        if not self._connection.poll(timeout_s):
            return None
        answer: Done | Refused = self._connection.recv()
        return answer

    def _reserve(self, size_bytes: int) -> int:
        """Extend the shared memory to at least this length and return its length."""
        if self._memory is None or len(self._memory) < size_bytes:
            os.ftruncate(self._memory_fd, size_bytes)
            self._memory = mmap.mmap(self._memory_fd, size_bytes)
        return len(self._memory)

    def kill(self) -> None:
        """Kill the process; `run` in another thread then raises WorkerLostError."""
        self._is_lost = True
        self._process.kill()

    def close(self) -> None:
        """End the process and release its resources."""
        self._connection.close()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._memory = None
        with contextlib.suppress(OSError):
            os.close(self._memory_fd)


def _environment() -> dict[str, str]:
    """Return the worker's environment: the parent's, with one thread for libraries, and this package's location."""
    paths = [str(Path(serving.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
    return {**_MEMORY, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
