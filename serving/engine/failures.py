"""Finds out why an engine did not start: vLLM's engine process logs the reason, but its caller only sees a failure."""

from __future__ import annotations

import os
import re
from pathlib import Path

from serving.errors import ServingError

_TAIL_BYTES = 256 * 1024
# vLLM 0.32's messages about its engine process (`vllm.v1.engine.utils`) and worker
# (`vllm.v1.executor.multiproc_executor`).
_REFERS = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|root cause")
# vLLM's prefix of each line: the process and, in log lines, level, time and location.
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:.]+ \[[^\]]*\] )?")
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit)(?:: .*)?")  # the last line of a traceback
_MARKS = re.compile(r"[\s^~]*")
# Errors that another attempt may not meet: memory, a port, or another machine may be available then.
_TRANSIENT = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|Free memory on device|Address already in use|"
    r"Connection|Timeout|timed out|Temporary failure|RayActorError|ActorDiedError",
    re.IGNORECASE,
)
UNKNOWN = "The engine's process ended without saying why: it may have been killed, by the kernel for memory say."


class StartLog:
    """What this process and its children write after its creation, if Ray redirects stdout and stderr to files."""

    def __init__(self) -> None:
        streams = (Path(os.readlink(f"/proc/self/fd/{number}")) for number in (1, 2))
        self._begins = {file: file.stat().st_size for file in streams if file.is_file()}

    def read(self) -> str:
        """Return the last 256 KiB of each file; empty if they are not redirected."""
        return "\n".join(_read_end(file, begin) for file, begin in self._begins.items())


def _read_end(file: Path, begin: int) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - _TAIL_BYTES))
        return stream.read().decode(errors="replace")


def explain(error: BaseException, log: str) -> str:
    """Return the reason in one or two lines: from the error, or from the engine process that the error refers to.

    Args:
        error: the exception from starting the engine.
        log: what was written to stdout and stderr meanwhile.
    """
    if isinstance(error, ServingError):  # written for people to read
        return str(error)
    if not _REFERS.search(str(error)):
        return f"{type(error).__name__}: {error}"
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    for number in range(len(lines) - 1, -1, -1):
        if _ERROR.fullmatch(lines[number]) and not _REFERS.search(lines[number]):
            return lines[number] if ": " in lines[number] else f"{lines[number]} at {_code_before(lines, number)}"
    return UNKNOWN


def _code_before(lines: list[str], number: int) -> str:
    """Return the last line of code in a traceback, for an error without a message."""
    shown = (line.strip() for line in reversed(lines[:number]) if not _MARKS.fullmatch(line))
    return f"`{next(shown, '?')}`"


def is_transient(reason: str) -> bool:
    """Whether another attempt to start the engine may succeed without changes."""
    return reason == UNKNOWN or bool(_TRANSIENT.search(reason))
