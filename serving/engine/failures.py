"""Why an engine did not start. vLLM's engine process tells it to its log; its caller only hears that it failed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from serving.errors import ServingError

_TAIL_BYTES = 256 * 1024
# vLLM 0.32 of an engine process (`vllm.v1.engine.utils`) and of its worker (`vllm.v1.executor.multiproc_executor`).
_REFERS = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|root cause")
# What vLLM puts before each line: the process, and in its log the level, the time and the place.
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:.]+ \[[^\]]*\] )?")
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit)(?:: .*)?")  # how a traceback ends
_MARKS = re.compile(r"[\s^~]*")
# Another start may find the memory, the port or the other machine that this one has missed.
_TRANSIENT = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|Free memory on device|Address already in use|"
    r"Connection|Timeout|timed out|Temporary failure|RayActorError|ActorDiedError",
    re.IGNORECASE,
)
UNKNOWN = "The engine's process ended without saying why: it may have been killed, by the kernel for memory say."


class StartLog:
    """What this process and its children write from now on, where Ray has stdout and stderr go to files."""

    def __init__(self) -> None:
        streams = (Path(os.readlink(f"/proc/self/fd/{number}")) for number in (1, 2))
        self._begins = {file: file.stat().st_size for file in streams if file.is_file()}

    def read(self) -> str:
        """The last 256 KiB of each; empty where they go elsewhere."""
        return "\n".join(_read_end(file, begin) for file, begin in self._begins.items())


def _read_end(file: Path, begin: int) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - _TAIL_BYTES))
        return stream.read().decode(errors="replace")


def explain(error: BaseException, log: str) -> str:
    """The reason in a line or two: the error's own words, or those of the engine process that it refers to.

    Args:
        error: what starting the engine raised.
        log: what was written to stdout and stderr meanwhile.
    """
    if isinstance(error, ServingError):  # written for a person to read
        return str(error)
    if not _REFERS.search(str(error)):
        return f"{type(error).__name__}: {error}"
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    for number in range(len(lines) - 1, -1, -1):
        if _ERROR.fullmatch(lines[number]) and not _REFERS.search(lines[number]):
            return lines[number] if ": " in lines[number] else f"{lines[number]} at {_code_before(lines, number)}"
    return UNKNOWN


def _code_before(lines: list[str], number: int) -> str:
    """The line of code that a traceback shows last, of an error that has no words of its own."""
    shown = (line.strip() for line in reversed(lines[:number]) if not _MARKS.fullmatch(line))
    return f"`{next(shown, '?')}`"


def is_transient(reason: str) -> bool:
    """Whether starting the engine again may succeed without anybody changing anything."""
    return reason == UNKNOWN or bool(_TRANSIENT.search(reason))
