"""Whole requests through two vLLM servers: one with the plugin, one with stock code, the same weights and flags.

A4 pages as JPEG in gundam mode, 16 at once, 256 tokens out, the n-gram guard on. With the nearly free model the GPU
step is as short as on a GPU, so what is measured is everything around it. With the nano sizes most of the time goes
into the model; a round with a single token out says how much of it a page costs before the first one. The two servers
take turns under the same load; the best round of each counts, which other work on the machine disturbed least.
"""

from __future__ import annotations

import base64
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.checkpoints import NEARLY_FREE, write_checkpoint
from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.fastpath.running import (
    GUARD_REQUEST,
    PIPELINE,
    STOCK_GUARD,
    STOCK_NAME,
    STOCK_SERVER,
    VLLM_SERVER,
    apply_load,
    run_server,
)
from serving.nano.config import NANO, NanoConfig

A4_200_DPI = (1654, 2339)
NUM_TOKENS, NUM_PAGES = 256, 32


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


def compare(
    name: str, sizes: NanoConfig, num_pages: int, num_rounds: int, tokens_out: tuple[int, ...]
) -> Iterator[Row]:
    """Both servers under the same load, in turns, once for every number of tokens out."""
    pages = build_pages(num_pages)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", sizes)
        ours = servers.enter_context(run_server(VLLM_SERVER, checkpoint, environment=PIPELINE))
        stock = servers.enter_context(run_server(STOCK_SERVER, checkpoint, *STOCK_GUARD, environment={}))
        sides: tuple[tuple[Any, dict[str, Any]], ...] = ((ours, {}), (stock, GUARD_REQUEST))
        for server, extra in sides:  # first requests pay for what is only done once
            apply_load(server, pages[:4], 2, extra)
        for num_tokens in tokens_out:
            rounds = [
                [apply_load(server, pages, num_tokens, extra) for server, extra in sides]
                for _ in range(rounds_of(num_rounds, least=1))
            ]
            most, most_of_stock = (max(load.pages_per_s for load in loads) for loads in zip(*rounds, strict=True))
            least, least_of_stock = (min(load.cpu_s_per_page for load in loads) for loads in zip(*rounds, strict=True))
            label = f"whole requests, {name}, {num_tokens} token{'s' * (num_tokens > 1)} out"
            yield Row.of_rates(label, most, most_of_stock, STOCK_NAME, None, "pages/s")
            yield Row.of_costs(f"{label}: CPU", least, least_of_stock, STOCK_NAME, None, "s per page")


def run() -> Iterator[Row]:
    """The nearly free model, and the nano one, where the model itself takes most of the time."""
    yield from compare("nearly free model", NEARLY_FREE, NUM_PAGES, 6, (NUM_TOKENS,))
    yield from compare("nano sizes", NANO, NUM_PAGES // 2, 2, (NUM_TOKENS, 1))
