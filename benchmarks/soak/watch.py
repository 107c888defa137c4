"""Memory and descriptors of every process of a stack, over time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.faults.stack import RunningStack

PARTS = ("replica", "router", "directory")
_EVERY_S = 2.0
_MIB = 2**20


@dataclass
class Series:
    """One process: times since the watch began, and what it had then."""

    part: str
    pid: int
    at_s: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def thinned(self, number: int = 150) -> dict[str, Any]:
        """For a file and a plot: so many readings at most."""
        step = max(1, len(self.at_s) // number)
        at_s = [round(at, 1) for at in self.at_s[::step]]
        mib = [round(value, 1) for value in self.mib[::step]]
        return {"part": self.part, "pid": self.pid, "at_s": at_s, "mib": mib, "files": self.files[::step]}


class Watch:
    """Reads in a thread of its own while its context lasts."""

    def __init__(self, stack: RunningStack) -> None:
        self._stack = stack
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.series: dict[int, Series] = {}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began_s = time.monotonic()
        while not self._over.wait(_EVERY_S):
            for part in PARTS:
                for process in self._find(part):
                    try:
                        memory, files = process.memory_full_info().uss, process.num_fds()
                    except psutil.Error:  # it has just been killed
                        continue
                    found = self.series.setdefault(process.pid, Series(part, process.pid))
                    found.at_s.append(time.monotonic() - began_s)
                    found.mib.append(memory / _MIB)
                    found.files.append(files)

    def _find(self, part: str) -> list[psutil.Process]:
        try:
            return self._stack.find(part)
        except psutil.Error:
            return []
