"""vLLM servers under a load of pages: with the plugin, and with stock code, the same weights and flags."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

CONCURRENCY = 16
VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"
STOCK_SERVER = "benchmarks.stock_server"
STOCK_NAME = "vLLM 0.32 server, stock code"
PIPELINE = {
    "VLLM_MEDIA_CONNECTOR": "serving",
    "SERVING_IMAGE_WORKERS": "1",
    "SERVING_ENCODER_THREADS": "2",
}
"""How the plugin's server is set beside its defaults."""
STOCK_GUARD = ("--logits-processors", "vllm.model_executor.models.deepseek_ocr:NGramPerReqLogitsProcessor")
GUARD_REQUEST = {"vllm_xargs": {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [1000, 1001]}}
"""The recipe's guard, which stock code wants to be asked for in every request."""
_READY_WITHIN_S = 240
_FLAGS = "--served-model-name m --dtype float32 --max-model-len 2048 --max-num-seqs 16 --enforce-eager " \
    "--no-enable-prefix-caching --mm-processor-cache-gb 0 --disable-uvicorn-access-log"  # fmt: skip
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",  # as in configs/local.yaml
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and its process."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds of the process and its children so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for times in (process.cpu_times() for process in family))


@contextlib.contextmanager
def run_server(module: str, checkpoint: Path, *flags: str, environment: Mapping[str, str]) -> Iterator[Server]:
    """A vLLM server in processes of its own, ready when this yields.

    Raises:
        RuntimeError: it ended or took too long; its log is in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", module, "--model", str(checkpoint), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *_FLAGS.split(), *flags],
            env={**os.environ, **_ENVIRONMENT, **environment},
            stdout=log,
            stderr=log,
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
            _wait_until_ready(server, process, log)
            yield server
        finally:
            if process.poll() is None:
                family = [server.process, *server.process.children(recursive=True)]
                process.terminate()
                for member in psutil.wait_procs(family, timeout=20)[1]:
                    member.kill()
                process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read().decode()[-3000:]}")
        time.sleep(0.5)


@dataclass(frozen=True, slots=True)
class Load:
    """What one round under load took, and the answers in the order of the pages."""

    pages_per_s: float
    cpu_s_per_page: float
    texts: tuple[str, ...]


def apply_load(server: Server, pages: Sequence[str], num_tokens: int | None, extra: Mapping[str, Any]) -> Load:
    """Send every page once, `CONCURRENCY` at a time.

    Args:
        server: it answers.
        pages: data URLs.
        num_tokens: exactly so many come out, whatever the model says; None leaves it to the model, within 480.
        extra: of every request's body.

    Raises:
        RuntimeError: an answer of another length.
    """
    return asyncio.run(_apply_load(server, pages, num_tokens, extra))


async def _apply_load(server: Server, pages: Sequence[str], num_tokens: int | None, extra: Mapping[str, Any]) -> Load:
    gate = asyncio.Semaphore(CONCURRENCY)
    length = {"max_tokens": 480} if num_tokens is None else {"max_tokens": num_tokens, "ignore_eos": True}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def ask(page: str) -> str:
            content = [{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": "Free OCR."}]
            messages = [{"role": "user", "content": content}]
            body = {"model": "m", "messages": messages, "temperature": 0, **length, **extra}
            async with gate, session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                answer = await response.json()
            if response.status != 200 or num_tokens not in (None, answer["usage"]["completion_tokens"]):
                raise RuntimeError(f"not {num_tokens} tokens: {answer}")
            return answer["choices"][0]["message"]["content"] or ""

        cpu_s, started_s = server.cpu_s(), time.monotonic()
        texts = await asyncio.gather(*map(ask, pages))
        took_s = time.monotonic() - started_s
        return Load(len(pages) / took_s, (server.cpu_s() - cpu_s) / len(pages), tuple(texts))
