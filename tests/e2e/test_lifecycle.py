"""Start and stop: ready in time, healed by Ray Serve, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import openai
import psutil
import pytest

from e2e.conftest import READY_WITHIN_S, ROOT, Stack, stop


def ask(stack: Stack) -> str:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
        )
    return answer.model


def find_engine_core(stack: Stack) -> psutil.Process:
    (core,) = (process for process in stack.descendants() if "EngineCore" in " ".join(process.cmdline()))
    return core


def test_a_taken_port_is_refused_at_once_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            ["make", "serve", f"PORT={port}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode != 0
    assert f"127.0.0.1:{port}" in done.stdout
    assert "PORT=" in done.stdout


@pytest.mark.slow
def test_engine_arguments_that_vllm_refuses_end_the_start_with_the_reason() -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/serving", "up", "--config", "configs/local.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={
            **os.environ,
            "SERVING__ROUTER__PORT": "18765",
            "SERVING__MODELS__NANO__ENGINE_ARGS": '{"max_model_length": 5}',
        },
    )
    assert done.returncode == 1
    assert "unrecognized arguments: --max-model-length" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.timeout(600)  # longer than what it waits for below, together
def test_a_dead_engine_is_replaced_and_ctrl_c_leaves_nothing(stack: Stack) -> None:
    """Runs last of all tests of the shared stack (see `pytest_collection_modifyitems`), since it ends it."""
    assert ask(stack) == "nano"
    core = find_engine_core(stack)
    os.kill(core.pid, signal.SIGKILL)
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            assert ask(stack) == "nano"
            break
        except openai.InternalServerError:  # any 5xx
            pass
        assert time.monotonic() < deadline, "Ray Serve did not replace the replica"
        time.sleep(0.5)
    assert find_engine_core(stack).pid != core.pid

    everything = [psutil.Process(stack.process.pid), *stack.descendants()]
    assert len(everything) > 5  # Ray, the replicas, the engine
    assert stop(stack) in (0, 2, 130, -signal.SIGINT)  # make tells of an interrupt in its own way
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert not alive, [process.cmdline() for process in alive]
    host, _, port = stack.url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
    assert "stopped" in stack.log.read_text()
