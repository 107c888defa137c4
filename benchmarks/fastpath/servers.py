"""Whole requests through two vLLM servers: one with the plugin, one with stock code, the same weights and flags.

A4 pages as JPEG in gundam mode, 16 at once, 256 tokens out, the n-gram guard on. With the nearly free model the GPU
step is as short as on a GPU, so what is measured is everything around it. The two servers take turns under the same
load; the better of two rounds counts.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from PIL import Image, ImageDraw

from benchmarks.checkpoints import NEARLY_FREE, write_checkpoint
from benchmarks.fastpath.rows import Row
from serving.demo.config import NANO, NanoConfig

A4_200_DPI = (1654, 2339)
NUM_TOKENS, CONCURRENCY, NUM_PAGES, ROUNDS = 256, 16, 32, 2
_READY_WITHIN_S = 240
_PEER_NAME = "vLLM 0.32 server, stock code"
_FLAGS = "--served-model-name m --dtype float32 --max-model-len 2048 --max-num-seqs 16 --enforce-eager " \
    "--no-enable-prefix-caching --mm-processor-cache-gb 0 --disable-uvicorn-access-log"  # fmt: skip
_SERVER = "vllm.entrypoints.launchers.api_server.entry"
_PIPELINE = {"VLLM_MEDIA_CONNECTOR": "serving", "SERVING_IMAGE_WORKERS": "1"}
_STOCK_GUARD = "vllm.model_executor.models.deepseek_ocr:NGramPerReqLogitsProcessor"
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
class Load:
    """What one round under load took."""

    pages_per_s: float
    cpu_s_per_page: float


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
            family = [server.process, *server.process.children(recursive=True)]
            process.terminate()
            for member in psutil.wait_procs(family, timeout=20)[1]:
                member.kill()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read().decode()[-3000:]}")
        time.sleep(0.5)


def build_pages(num_pages: int) -> list[str]:
    """Scans of A4 pages with print and paper grain, as JPEG data URLs; all different, so that nothing is cached."""
    pages = []
    for number in range(num_pages):
        generator = np.random.default_rng(number)
        grain = generator.integers(225, 256, (A4_200_DPI[1] // 2, A4_200_DPI[0] // 2), dtype=np.uint8)
        page = Image.fromarray(grain).resize(A4_200_DPI).convert("RGB")
        draw = ImageDraw.Draw(page)
        for line in range(60):
            words = " ".join(str(generator.integers(10**6)) for _ in range(16))
            draw.text((120, 120 + 35 * line), words, fill="black", font_size=24)
        buffer = io.BytesIO()
        page.save(buffer, "JPEG", quality=85)
        pages.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return pages


async def apply_load(server: Server, pages: list[str], extra: dict[str, Any]) -> Load:
    """Send every page once, `CONCURRENCY` at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def ask(page: str) -> None:
            content = [{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": "Free OCR."}]
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                **extra,
            }
            async with gate, session.post(f"{server.url}/v1/chat/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
                if usage["completion_tokens"] != NUM_TOKENS:
                    raise RuntimeError(f"{usage['completion_tokens']} tokens came instead of {NUM_TOKENS}")

        cpu_s, started_s = server.cpu_s(), time.monotonic()
        await asyncio.gather(*map(ask, pages))
        took_s = time.monotonic() - started_s
        return Load(len(pages) / took_s, (server.cpu_s() - cpu_s) / len(pages))


def compare(name: str, sizes: NanoConfig, num_pages: int) -> Iterator[Row]:
    """Both servers under the same load, in turns."""
    pages = build_pages(num_pages)
    guard = {"vllm_xargs": {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [1000, 1001]}}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", sizes)
        ours = servers.enter_context(run_server(_SERVER, checkpoint, environment=_PIPELINE))
        stock_flags = ("--logits-processors", _STOCK_GUARD)
        stock = servers.enter_context(run_server("benchmarks.stock_server", checkpoint, *stock_flags, environment={}))
        sides = ((ours, {}), (stock, guard))
        for server, extra in sides:  # first requests pay for what is only done once
            asyncio.run(apply_load(server, pages[:4], extra))
        rounds = [[asyncio.run(apply_load(server, pages, extra)) for server, extra in sides] for _ in range(ROUNDS)]
    best = [max((turn[side] for turn in rounds), key=lambda load: load.pages_per_s) for side in (0, 1)]
    cheapest = [min(turn[side].cpu_s_per_page for turn in rounds) for side in (0, 1)]
    yield Row.of_rates(f"whole requests, {name}", best[0].pages_per_s, best[1].pages_per_s, _PEER_NAME, None, "pages/s")
    yield Row.of_costs(f"whole requests, {name}: CPU", cheapest[0], cheapest[1], _PEER_NAME, None, "s per page")


def run() -> Iterator[Row]:
    """The nearly free model, and the nano one, where the model itself takes most of the time."""
    yield from compare("nearly free model", NEARLY_FREE, NUM_PAGES)
    yield from compare("nano sizes", NANO, NUM_PAGES // 2)
