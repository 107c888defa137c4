"""A page from the file to model-ready pixels: CPU time, pages per second with two processes, bytes to the engine.

The page is 1654 x 2339 pixels (A4 at 200 dpi) of text as JPEG, in gundam mode. Stock is vLLM's own path: its
connector's decoding with Pillow, its DeepseekOCRProcessor, and the cast to the model's dtype that it makes before the
pixels cross to the engine. Ours are bytes until they are on the model's device; rows that add the cost of normalising
them there, as a CPU does it, are beside the others, since stock's figure has it inside.
"""

from __future__ import annotations

import io
import statistics
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row, cpu_seconds
from benchmarks.stock import NAME, import_stock
from serving.plugin.images.decoding import decode
from serving.plugin.images.page_views import WHITE, PageViews, build_views
from serving.plugin.images.pool import ImagePool, Ticket
from serving.plugin.images.settings import ImagePipelineSettings
from serving.plugin.images.worker_messages import ViewJob
from serving.plugin.model.vision import normalise
from serving.plugin.modes.resolution import ResolutionMode

SIZE = (1654, 2339)
MODE = ResolutionMode()
GREY = (127, 127, 127)
HALF = (0.5, 0.5, 0.5)
FORMATS = ("JPEG",)
REPEATS = 9
POOL_PAGES = 60
POOL_ROUNDS = 8


def run() -> Iterator[Row]:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    data = draw_page()
    stock = StockPath()
    times = measure_in_turns(
        {
            "stock": lambda: stock.run(data, torch.bfloat16),
            "ours": lambda: run_ours(data),
            "floor": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        }
    )
    views = run_ours(data)
    whole = times["ours"] + statistics.median(_repeat(lambda: normalise_views(views)))
    yield Row.of_costs("page", times["ours"], times["stock"], NAME, times["floor"], "ms CPU")
    label = "page, normalised to bf16 on this CPU"
    yield Row.of_costs(label, whole, times["stock"], NAME, times["floor"], "ms CPU")
    yield from measure_pool(data, times["stock"])
    ours = sum(part.nbytes for part in (views.global_view, views.tiles))
    for dtype in (torch.float32, torch.bfloat16):
        theirs = sum(part.nbytes for part in stock.run(data, dtype))
        yield Row.of_costs(f"bytes to the engine, {dtype}", ours / 1e6, theirs / 1e6, NAME, ours / 1e6, "MB")


def draw_page() -> bytes:
    """Lines of random words in black on white."""
    page = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(page)
    letters = np.random.default_rng(0)
    for y in range(120, SIZE[1] - 120, 34):
        words = (
            "".join(chr(97 + code) for code in letters.integers(0, 26, length))
            for length in letters.integers(2, 10, 17)
        )
        pen.text((120, y), " ".join(words), fill="black", font_size=22)
    file = io.BytesIO()
    page.save(file, "JPEG", quality=90)
    return file.getvalue()


class StockPath:
    """vLLM's connector and processor, around a tokenizer that knows just enough."""

    def __init__(self) -> None:
        from vllm.multimodal.media.image import ImageMediaIO

        module = import_stock("vllm.transformers_utils.processors.deepseek_ocr")
        self._loader = ImageMediaIO()
        self._processor: Any = object.__new__(module.DeepseekOCRProcessor)
        self._processor.__dict__.update(
            tokenizer=types.SimpleNamespace(
                encode=lambda text, **_: [5] * len(text), bos_token_id=0, eos_token_id=1, pad_token_id=2
            ),
            image_token="<image>",
            image_token_id=3,
            ignore_id=-100,
            image_size=MODE.image_size,
            base_size=MODE.base_size,
            max_crops=MODE.max_tiles,
            strategy="v1",
            patch_size=16,
            downsample_ratio=4,
            image_transform=module.ImageTransform(),
        )

    def run(self, data: bytes, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Global view and tiles, as they cross to the engine."""
        page = self._loader.load_bytes(data).media
        _, view, tiles, *_ = self._processor.tokenize_with_images("<image>", [page])
        return view.to(dtype), tiles.to(dtype)


def run_ours(data: bytes) -> PageViews:
    return build_views(decode(data, FORMATS, WHITE), MODE, GREY)


def normalise_views(views: PageViews) -> list[torch.Tensor]:
    parts = (views.global_view[None], views.tiles)
    return [normalise(part, HALF, HALF, torch.bfloat16) for part in parts]


def measure_in_turns(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of CPU of each, taken in turns, so that a busy moment of the machine falls on all."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(REPEATS + 1):
        for name, work in works.items():
            spent = cpu_seconds(work) * 1e3
            if round_:  # the first one warms up
                samples[name].append(spent)
    return {name: statistics.median(values) for name, values in samples.items()}


def _repeat(work: Callable[[], object]) -> list[float]:
    work()
    return [cpu_seconds(work) * 1e3 for _ in range(REPEATS)]


def measure_pool(data: bytes, stock_ms: float) -> Iterator[Row]:
    """Pages per second by wall clock, and by CPU time: what the processes would give with a core each to themselves."""
    pools = {count: ImagePool(ImagePipelineSettings(workers=count, queue=POOL_PAGES)) for count in (1, 2)}
    try:
        for count, pool in pools.items():
            _warm_up(pool, data, count)
        rounds = [
            {count: _run_pool(pool, data) for count, pool in pools.items()} for _ in range(rounds_of(POOL_ROUNDS))
        ]
    finally:
        for pool in pools.values():
            pool.close()
    # The fastest round is the one that other work on the machine has disturbed least.
    rate = {count: max(one[count][0] for one in rounds) for count in pools}
    capacity, parent_ms = (
        {count: statistics.median(one[count][index] for one in rounds) for count in pools} for index in (1, 2)
    )
    stock_rate = 1e3 / stock_ms
    yield Row.of_rates("pool, 2 processes, wall", rate[2], rate[1], "1 process", None, "pages/s")
    yield Row.of_rates("pool, 2 processes, by CPU", capacity[2], capacity[1], "1 process", None, "pages/s")
    yield Row.of_rates("pool, 2 processes, by CPU", capacity[2], stock_rate, f"{NAME}, in-process", None, "pages/s")
    yield Row.of_costs("page, API process with a pool", parent_ms[2], stock_ms, NAME, None, "ms CPU")


def _warm_up(pool: ImagePool, data: bytes, count: int) -> None:
    pool.start()
    while len(pool.pids) < count:
        time.sleep(0.05)
    _run_pool(pool, data)


def _run_pool(pool: ImagePool, data: bytes) -> tuple[float, float, float]:
    """Pages per second by wall clock; the same if every worker had a core; milliseconds of this process per page."""
    begin, own, workers = time.perf_counter(), time.process_time(), sum(map(_cpu_of, pool.pids))
    tickets = [Ticket(ViewJob(SIZE, MODE, GREY, WHITE, FORMATS), data) for _ in range(POOL_PAGES)]
    for ticket in tickets:
        pool.put(ticket)
    for ticket in tickets:
        ticket.views.result()
    spent = sum(map(_cpu_of, pool.pids)) - workers
    own_ms = (time.process_time() - own) * 1e3 / POOL_PAGES
    return POOL_PAGES / (time.perf_counter() - begin), POOL_PAGES / spent * len(pool.pids), own_ms


def _cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used so far."""
    nanoseconds = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    return nanoseconds / 1e9
