"""Why an engine did not start. vLLM's engine process tells it to its log; its caller only hears that it failed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from serving.errors import ServingError

_TAIL_BYTES = 256 * 1024
# vLLM 0.32 of an engine process (`vllm.v1.engine.utils`) and of its worker (`vllm.v1.executor.multiproc_executor`).
_REFERS = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|root cause")
# How a traceback ends, in a log line of vLLM's or bare.
_ERROR = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [\d-]+ [\d:.]+ \[[^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception|Exit): \S.*)$", re.MULTILINE
)
# Another start may find the memory, the port or the other machine that this one has missed.
_TRANSIENT = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|Free memory on device|Address already in use|"
    r"Connection|Timeout|timed out|Temporary failure|RayActorError|ActorDiedError",
    re.IGNORECASE,
)
UNKNOWN = "The engine's process ended without saying why: it may have been killed, by the kernel for memory say."


class StartLog:
    """What this process and its children write to stderr from now on, where Ray has that go to a file."""

    def __init__(self) -> None:
        self._file = Path(os.readlink("/proc/self/fd/2"))
        self._begin = self._file.stat().st_size if self._file.is_file() else 0

    def read(self) -> str:
        """Its last 256 KiB; empty where stderr is no file."""
        if not self._file.is_file():
            return ""
        with self._file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")


def explain(error: BaseException, log: str) -> str:
    """The reason in a line or two: the error's own words, or those of the engine process that it refers to.

    Args:
        error: what starting the engine raised.
        log: what was written to stderr meanwhile.
    """
    if isinstance(error, ServingError):  # written for a person to read
        return str(error)
    if not _REFERS.search(str(error)):
        return f"{type(error).__name__}: {error}"
    found = [line for line in _ERROR.findall(log) if not _REFERS.search(line)]
    return str(found[-1]).strip() if found else UNKNOWN


def is_transient(reason: str) -> bool:
    """Whether starting the engine again may succeed without anybody changing anything."""
    return reason == UNKNOWN or bool(_TRANSIENT.search(reason))
