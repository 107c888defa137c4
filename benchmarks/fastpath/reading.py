"""What the trained nano checkpoint reads, and how fast: with the plugin and with stock code, and by mode.

Pages are those of the checkpoint's model card, unseen in training. Accuracy is the character error rate (CER) of
answers that end by themselves; speed is measured with the same number of tokens out on both sides, so that it does not
depend on what is read. The mix is pages of 512 pixels and the same at twice the resolution.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.fastpath.running import (
    GUARD_REQUEST,
    PIPELINE,
    STOCK_GUARD,
    STOCK_NAME,
    STOCK_SERVER,
    VLLM_SERVER,
    Server,
    apply_load,
    run_server,
)
from benchmarks.stock import SIZES_FILE
from serving.nano.build import build_checkpoint
from serving.nano.config import NANO
from serving.nano.pages import CORE, RenderedPage, sample_page, with_chars
from serving.nano.training.metrics import mean_error_rate

SEED, NUM_PAGES, NUM_MIXED, ROUNDS = 100, 100, 32, 2
NUM_TOKENS = 208
"""What a page of the model card has on average."""
_MODE_PEER = "gundam for every page"


def run() -> Iterator[Row]:
    """Accuracy against stock code, then `auto` against gundam."""
    pages = [sample_page(with_chars(CORE, 100, 350), "test", SEED, index) for index in range(NUM_PAGES)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build_checkpoint(Path(folder) / "checkpoint")
        (checkpoint / SIZES_FILE).write_text(json.dumps(dataclasses.asdict(NANO)))
        with run_server(VLLM_SERVER, checkpoint, "--trust-request-mm-kwargs", environment=PIPELINE) as ours:
            with run_server(STOCK_SERVER, checkpoint, *STOCK_GUARD, environment={}) as stock:
                yield from compare_accuracy(ours, stock, pages)
            yield from compare_modes(ours, pages[:NUM_MIXED])


def compare_accuracy(ours: Server, stock: Server, pages: Sequence[RenderedPage]) -> Iterator[Row]:
    """The checkpoint's own mode, which is tiny, through both servers."""
    urls, truths = [encode(page, 1) for page in pages], [page.text for page in pages]
    reads = apply_load(ours, urls, None, {}).texts, apply_load(stock, urls, None, GUARD_REQUEST).texts
    mine, theirs = (100 * mean_error_rate(texts, truths) for texts in reads)
    yield Row.of_costs(f"nano checkpoint, CER of {len(pages)} pages", mine, theirs, STOCK_NAME, None, "%")
    equal = sum(left == right for left, right in zip(*reads, strict=True))
    yield Row.of_rates("nano checkpoint, answers equal to stock's", equal, len(pages), STOCK_NAME, None, "answers")


def compare_modes(server: Server, pages: Sequence[RenderedPage]) -> Iterator[Row]:
    """One server, the mix in two modes, in turns."""
    urls = [encode(page, 1 + number % 2) for number, page in enumerate(pages)]
    truths = [page.text for page in pages]
    modes = [{"mm_processor_kwargs": {"mode": mode}} for mode in ("auto", "gundam")]
    reads = [apply_load(server, urls, None, mode).texts for mode in modes]
    rounds = [[apply_load(server, urls, NUM_TOKENS, mode) for mode in modes] for _ in range(rounds_of(ROUNDS, least=1))]
    most, most_theirs = (max(load.pages_per_s for load in loads) for loads in zip(*rounds, strict=True))
    least, least_theirs = (min(load.cpu_s_per_page for load in loads) for loads in zip(*rounds, strict=True))
    yield Row.of_rates("nano checkpoint, a mix in mode auto", most, most_theirs, _MODE_PEER, None, "pages/s")
    yield Row.of_costs("nano checkpoint, a mix in mode auto: CPU", least, least_theirs, _MODE_PEER, None, "s per page")
    for name, part in (("", slice(None)), (", small pages", slice(0, None, 2)), (", large pages", slice(1, None, 2))):
        mine, theirs = (100 * mean_error_rate(texts[part], truths[part]) for texts in reads)
        yield Row.of_costs(f"nano checkpoint, a mix in mode auto: CER{name}", mine, theirs, _MODE_PEER, None, "%")


def encode(page: RenderedPage, scale: int) -> str:
    """A page as a PNG data URL, printed at so many times its resolution."""
    image = Image.fromarray(page.pixels)
    file = io.BytesIO()
    image.resize((image.width * scale, image.height * scale)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
