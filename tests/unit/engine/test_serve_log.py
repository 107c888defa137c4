from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from serving.engine.serve_log import keep_serve_log

# What a replica's process goes through: Serve's handlers, vLLM's start, a record, the question of a new controller.
REPLICA = """
import logging, sys
from logging.handlers import MemoryHandler
from serving.engine.serve_log import keep_serve_log
from serving.plugin.interfaces import vllm_internals as private

handler = MemoryHandler(1, target=logging.FileHandler(sys.argv[1]))
logging.getLogger("ray.serve").addHandler(handler)
arguments = private.parse_server_args(["--model", "any"])
with keep_serve_log():
    private.configure_logging(arguments)
    assert handler.target is None, "vLLM leaves Serve's handlers alone now: serving/engine/serve_log.py can go"
logging.getLogger("ray.serve").warning("still here")
print(handler.target.baseFilename)
"""


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[MemoryHandler]:
    handler = MemoryHandler(1, target=logging.FileHandler(tmp_path / "serve.log"))
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    if handler.target is not None:
        handler.target.close()
    handler.close()


def test_records_reach_serves_file_after_all_handlers_were_closed(handler: MemoryHandler, tmp_path: Path) -> None:
    target = handler.target
    assert target is not None
    with keep_serve_log():
        target.close()
        handler.close()  # as `dictConfig` does
        assert handler.target is None
        logging.getLogger("ray.serve").warning("meanwhile")
    assert handler.target is target
    logging.getLogger("ray.serve").warning("afterwards")
    assert (tmp_path / "serve.log").read_text() == "meanwhile\nafterwards\n"


def test_a_target_that_somebody_else_has_set_stays(handler: MemoryHandler, tmp_path: Path) -> None:
    first, other = handler.target, logging.FileHandler(tmp_path / "other.log", delay=True)
    with keep_serve_log():
        handler.setTarget(other)
    assert handler.target is other
    assert first is not None
    first.close()


def test_vllm_takes_serves_file_away_once_and_it_is_given_back(tmp_path: Path) -> None:
    file = tmp_path / "serve.log"
    command = [sys.executable, "-W", "ignore", "-c", REPLICA, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == str(file)
    assert file.read_text() == "still here\n"
