from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serving.engine.failures import UNKNOWN, explain, is_transient
from serving.errors import SettingsError

# As vLLM 0.32 logs it, shortened; taken from a checkpoint whose embedding has another shape than its configuration.
LOG = """\
INFO 11-30 04:20:01 [core.py:100] Initializing a V1 LLM engine
(Worker pid=78) ERROR 11-30 04:20:08 [multiproc_executor.py:900] WorkerProc failed to start.
(Worker pid=78) ERROR 11-30 04:20:08 [multiproc_executor.py:900] Traceback (most recent call last):
(Worker pid=78) ERROR 11-30 04:20:08 [multiproc_executor.py:900] ValueError: a shape that does not fit
(EngineCore pid=77) ERROR 11-30 04:20:09 [core.py:1136] EngineCore failed to start.
(EngineCore pid=77) ERROR 11-30 04:20:09 [core.py:1136] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-30 04:20:09 [core.py:1136]   File "core.py", line 1110, in run_engine_core
(EngineCore pid=77) ERROR 11-30 04:20:09 [core.py:1136] Exception: WorkerProc initialization failed due to an exception.
(EngineCore pid=77) Process EngineCore:
(EngineCore pid=77) Traceback (most recent call last):
(EngineCore pid=77) Exception: WorkerProc initialization failed due to an exception.
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_engine_processes_own_error_is_the_reason() -> None:
    error = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert explain(error, LOG) == "ValueError: a shape that does not fit"
    assert explain(error, "") == UNKNOWN
    bare = LOG.replace(
        "ValueError: a shape that does not fit\n(EngineCore",
        "    assert shape == size\n"
        "(Worker pid=78) ERROR 11-30 04:20:08 [multiproc_executor.py:900]            ^^^^^^^^^^^^^\n"
        "(Worker pid=78) ERROR 11-30 04:20:08 [multiproc_executor.py:900] AssertionError\n(EngineCore",
    )
    assert bare != LOG
    assert explain(error, bare) == "AssertionError at `assert shape == size`"
    assert explain(error, "nothing\nof use: here\n") == UNKNOWN


def test_an_error_that_says_what_it_is_needs_no_log() -> None:
    assert explain(KeyError("x"), LOG) == "KeyError: 'x'"
    assert explain(SettingsError("checkpoint x: there is none"), LOG) == "checkpoint x: there is none"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (UNKNOWN, True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", True),
        ("ValueError: Free memory on device (1.2/80 GiB) is less than desired GPU memory utilization", True),
        ("OSError: [Errno 98] Address already in use", True),
        ("requests.exceptions.ReadTimeout: timed out", True),
        ("ConnectionError: no route", True),
        ("ValueError: a shape that does not fit", False),
        ("engine_args: vLLM does not accept them", False),
        ("safetensors_rust.SafetensorError: Error while deserializing header", False),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(reason: str, expected: bool) -> None:
    assert is_transient(reason) is expected


def test_the_log_is_what_was_written_since(tmp_path: Path) -> None:
    code = """
import os, sys
from serving.errors import SettingsError
from serving.engine.failures import StartLog
os.write(2, b"before\\n")
log = StartLog()
os.write(2, b"x" * 300_000 + b"\\nafter\\n")
text = log.read()
assert text.endswith("x\\nafter\\n") and len(text) < 257 * 1024 and "before" not in text
"""
    with (tmp_path / "log").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=out, check=True, timeout=60)
    with_pipe = "from serving.engine.failures import StartLog\nlog = StartLog()\nassert log.read() == ''"
    subprocess.run([sys.executable, "-c", with_pipe], capture_output=True, check=True, timeout=60)
