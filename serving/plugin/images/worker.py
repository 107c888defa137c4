"""The process that decodes and tiles pages for the API process: `python -m serving.plugin.images.worker SOCKET MEMORY`.

SOCKET and MEMORY are inherited file descriptors: for jobs and answers, and for the pixels. Neither has a name, so
nothing is left behind however the processes end. Neither torch nor vLLM is imported.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

import cv2
import numpy as np

from serving.plugin.images.decoding import DecodeError, decode, size_of
from serving.plugin.images.views import Layout, draw_views
from serving.plugin.images.worker_messages import Done, Ready, Refused, ViewJob
from serving.plugin.modes.resolution import ResolutionMode

_ORPHAN_CHECK_S = 5.0


def run_job(job: ViewJob, data: bytes, buffer: mmap.mmap) -> None:
    """Decode a file and create its views.

    Raises:
        DecodeError: the file is damaged, or differs from its header.
    """
    page = decode(data, job.formats, job.background)
    if size_of(page) != job.size:
        raise DecodeError(f"Failed to load image: its pixels are {size_of(page)}, its header said {job.size}")
    draw_views(page, Layout.of(job.size, job.mode), job.padding, buffer)


def serve(connection: Connection, memory_fd: int) -> None:
    """Process jobs until the parent closes the connection or ends."""
    parent = os.getppid()
    memory: mmap.mmap | None = None
    while _has_work(connection, parent):
        job: ViewJob = connection.recv()
        data = connection.recv_bytes()
        begin = time.perf_counter()
        if memory is None or len(memory) < job.memory_bytes:
            memory = mmap.mmap(memory_fd, job.memory_bytes)
        try:
            run_job(job, data, memory)
        except DecodeError as error:
            connection.send(Refused(str(error)))
        else:
            connection.send(Done(time.perf_counter() - begin))


def _has_work(connection: Connection, parent: int) -> bool:
    """Wait for a job. The parent's process is watched too, since a process that it forked may keep the socket open."""
    while not connection.poll(_ORPHAN_CHECK_S):
        if os.getppid() != parent:
            return False
    return True


def main(socket_fd: int, memory_fd: int) -> None:
    # Ctrl-C reaches the whole process group, but the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    with Connection(socket_fd) as connection, contextlib.suppress(EOFError, ConnectionError):
        _warm_up()
        connection.send(Ready())
        serve(connection, memory_fd)  # until the parent closes the connection


def _warm_up() -> None:
    """Import and initialise everything that would otherwise delay the first page."""
    layout = Layout.of((2, 1), ResolutionMode())
    draw_views(np.zeros((1, 2, 3), np.uint8), layout, (0, 0, 0), np.empty(layout.size_bytes, np.uint8))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
