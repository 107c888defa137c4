"""The plugin in vLLM's own server, with nothing else of the stack: what its users see over HTTP."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.image_files import encode, scene

from benchmarks.checkpoints import NEARLY_FREE, write_checkpoint
from benchmarks.fastpath.running import VLLM_SERVER, Server, run_server

WAIT_S = 60.0  # for a machine that is busy
QUEUE_TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One image worker, and room for one page that waits for it."""
    environment = {
        "VLLM_MEDIA_CONNECTOR": "serving",
        "SERVING_IMAGE_WORKERS": "1",
        "SERVING_IMAGE_QUEUE": "1",
        "SERVING_IMAGE_QUEUE_TIMEOUT_S": str(QUEUE_TIMEOUT_S),
        "SERVING_ENCODER_THREADS": "2",
    }
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), NEARLY_FREE)
    with run_server(VLLM_SERVER, checkpoint, environment=environment) as server:
        yield server


def page_url(shade: int) -> str:
    page = scene(200, 200 + shade)
    return "data:image/png;base64," + base64.b64encode(encode(page, "PNG")).decode()


def ask(server: Server, number: int = 0, **changes: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to a page; pages of different numbers differ."""
    content = [{"type": "image_url", "image_url": {"url": page_url(number)}}, {"type": "text", "text": "Free OCR."}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body | changes).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def metric(server: Server, name: str, labels: str = "") -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=WAIT_S) as answer:
        found = re.search(rf"^{name}{re.escape(labels)} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found, f"/metrics has no {name}{labels}"
    return float(found[1])


def image_worker(server: Server) -> psutil.Process:
    (worker,) = (
        child for child in server.process.children(recursive=True) if "serving.plugin.images.worker" in child.cmdline()
    )
    return worker


@contextlib.contextmanager
def held(process: psutil.Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def wait_for(server: Server, name: str, value: float) -> None:
    end = time.monotonic() + WAIT_S
    while metric(server, name) != value:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_page_is_answered(server: Server) -> None:
    assert ask(server)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_503_and_loses_nothing_that_waits(server: Server, stream: bool) -> None:
    assert ask(server)[0] == 200  # the worker is there
    with concurrent.futures.ThreadPoolExecutor(2) as others:
        with held(image_worker(server)):
            working = others.submit(ask, server, 1)
            wait_for(server, "serving_image_queue_pages", 0)
            time.sleep(0.5)  # until the worker has it; nothing shows that
            waiting = others.submit(ask, server, 2)
            wait_for(server, "serving_image_queue_pages", 1)
            begin = time.monotonic()
            status, answer = ask(server, 3, stream=stream)
            assert time.monotonic() - begin < QUEUE_TIMEOUT_S + WAIT_S / 4
        assert status == 503
        assert "too many pages are waiting" in answer["error"]["message"]
        assert answer["error"]["code"] == 503
        assert working.result()[0] == waiting.result()[0] == 200
    assert metric(server, "serving_image_failures_total", '{reason="full"}') >= 1


def test_a_loop_that_is_cut_shows_in_the_metrics(server: Server) -> None:
    names = ("serving_repetition_stops_total", ""), ("serving_wasted_tokens_total", '{reason="repetition"}')
    before = [metric(server, *name) for name in names]
    forced: dict[str, Any] = {"logit_bias": {"300": 100}, "max_tokens": 400}
    status, answer = ask(server, **forced, vllm_xargs={"ngram_size": 0, "repeated_tokens": 64})
    assert status == 200
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("length", "repetition")
    num_tokens = answer["usage"]["completion_tokens"]
    status, answer = ask(server, **forced, vllm_xargs={"ngram_size": 0, "repeated_tokens": 0})  # reaches its limit
    assert answer["usage"]["completion_tokens"] == 400
    after = [metric(server, *name) for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, num_tokens - 1]
