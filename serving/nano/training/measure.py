"""Measure a checkpoint on unseen pages: `python -m serving.nano.training.measure --checkpoint DIR`, or `--url URL`.

The first runs the plain PyTorch model. The second posts the pages to a running stack, which takes the same weights
through everything that a request goes through.
"""

import base64
import io
import json
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from serving.nano.pages import CORE, WIDE, PageSpec, RenderedPage, sample_page, with_chars
from serving.nano.tokenizer import decode_ids
from serving.nano.training.batches import OCR_PROMPT, resize_view
from serving.nano.training.metrics import character_error_rate
from serving.nano.training.model import NanoOcr, load_model
from serving.nano.training.stretch import KINDS, stretch_page

VIEW_PX = {"tiny": 512, "small": 640, "base": 1024, "large": 1280, "gundam": 1024}
"""Pixels a side of what each mode makes of a page of 512; gundam cuts such a page into no tiles."""
SPECS = {"core": with_chars(CORE, 100, 350), "wide": with_chars(WIDE, 100, 350)}
MAX_TOKENS = 480
"""More than any page has; an answer of that length has not found its end."""
_BATCH_PAGES = 16
_AT_ONCE = 8

Reader = Callable[[Sequence[RenderedPage]], list[str]]


@dataclass(frozen=True)
class Reading:
    """A page, what was read from it and the character error rate of that."""

    page: RenderedPage
    read: str
    rate: float


def read_pages(
    model: NanoOcr, pages: Sequence[RenderedPage], max_tokens: int = MAX_TOKENS, view_px: int | None = None
) -> list[str]:
    """Read pages greedily with the default prompt, at `view_px` pixels a side or the native size."""
    import torch

    texts: list[str] = []
    for start in range(0, len(pages), _BATCH_PAGES):
        batch = pages[start : start + _BATCH_PAGES]
        views = np.stack([resize_view(page.pixels, view_px or model.sizes.image_size) for page in batch])
        texts += [decode_ids(ids) for ids in model.generate(torch.from_numpy(views), OCR_PROMPT, max_tokens)]
    return texts


def post_page(url: str, page: RenderedPage, mode: str) -> str:
    """Return what a running stack at `url` reads from a page in a mode."""
    file = io.BytesIO()
    Image.fromarray(page.pixels).save(file, "PNG")
    image = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "Free OCR."}]
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "mm_processor_kwargs": {"mode": mode},
    }
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"] or ""


def _join_spaces(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def measure_texts(pages: Sequence[RenderedPage], texts: Sequence[str]) -> list[Reading]:
    """Compare what was read with what the pages say."""
    return [Reading(page, text, character_error_rate(text, page.text)) for page, text in zip(pages, texts, strict=True)]


def held_out_pages(spec: PageSpec, num_pages: int, seed: int) -> list[RenderedPage]:
    """Return the first pages of a specification whose words were kept out of training."""
    return [sample_page(spec, "test", seed, index) for index in range(num_pages)]


def measure_pages(
    model: NanoOcr, spec: PageSpec, num_pages: int, seed: int, view_px: int | None = None
) -> list[Reading]:
    """Read `num_pages` held-out pages of a specification."""
    pages = held_out_pages(spec, num_pages, seed)
    return measure_texts(pages, read_pages(model, pages, view_px=view_px))


def measure_stretch(reader: Reader, num_pages: int, seed: int) -> dict[str, list[Reading]]:
    """Read `num_pages` of each kind of page that was never trained on, runs of spaces counting as one."""
    kinds = {kind: [stretch_page(kind, seed, index) for index in range(num_pages)] for kind in KINDS}
    return {kind: measure_texts(pages, [_join_spaces(t) for t in reader(pages)]) for kind, pages in kinds.items()}


def _add_groups(
    table: Table, readings: list[Reading], name: str, key: Callable[[RenderedPage], object], tokens: int
) -> None:
    groups: dict[object, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(key(reading.page), []).append(reading)
    for value in sorted(groups, key=str):
        _add_row(table, f"{name} {value}", groups[value], tokens)


def _add_row(table: Table, name: str, readings: Iterable[Reading], tokens: int) -> None:
    rows = list(readings)
    rates = np.array([row.rate for row in rows])
    chars = float(np.mean([len(row.page.text) for row in rows]))
    figures = (rates.mean(), np.median(rates), rates.max(), (rates == 0).mean())
    counts = (int((rates > 0.1).sum()), sum(len(row.read) >= MAX_TOKENS for row in rows))
    shares = (f"{100 * x:.2f}%" for x in figures)
    table.add_row(name, str(len(rows)), f"{chars:.0f}", f"{chars / tokens:.1f}", *shares, *map(str, counts))


def _build_table(title: str) -> Table:
    table = Table(title=title)
    for column in ("pages", "count", "chars", "per token", "mean", "median", "worst", "exact", "> 10%", "endless"):
        table.add_column(column, justify="left" if column == "pages" else "right", no_wrap=True)
    return table


def build_table(title: str, readings: list[Reading], num_vision_tokens: int) -> Table:
    """Return error rates overall and by characters, lines, font and size."""
    table = _build_table(title)
    _add_row(table, "all", readings, num_vision_tokens)
    groups: tuple[tuple[str, Callable[[RenderedPage], object]], ...] = (
        ("characters from", lambda page: f"{len(page.text) // 50 * 50:03}"),
        ("lines", lambda page: f"{page.text.count(chr(10)) + 1:02}"),
        ("font", lambda page: page.style.font),
        ("size", lambda page: page.style.font_size_px),
    )
    for name, key in groups:
        _add_groups(table, readings, name, key, num_vision_tokens)
    return table


def _build_reader(checkpoint: Path, url: str | None, mode: str) -> Reader:
    if url is not None:
        address = url.rstrip("/")

        def post(pages: Sequence[RenderedPage]) -> list[str]:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return list(pool.map(lambda page: post_page(address, page, mode), pages))

        return post
    model = load_model(checkpoint)
    return lambda pages: read_pages(model, pages, view_px=VIEW_PX[mode])


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint directory or weights file.")] = Path("checkpoints/nano"),
    url: Annotated[str | None, typer.Option(help="A running stack to measure instead.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="Modes to read in; tiny if none is given.")] = None,
    pages: Annotated[int, typer.Option(help="Pages per specification.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the held-out pages.")] = 100,
    stretch: Annotated[bool, typer.Option("--stretch", help="Also pages of kinds that were never trained on.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print character error rates on held-out pages."""
    import torch

    torch.set_num_threads(threads)
    console = Console(width=120)
    for name in mode or ["tiny"]:
        reader, tokens = _build_reader(checkpoint, url, name), (VIEW_PX[name] // 64) ** 2
        for title, spec in SPECS.items():
            drawn = held_out_pages(spec, pages, seed)
            console.print(build_table(f"{title}, {name}", measure_texts(drawn, reader(drawn)), tokens))
        if stretch:
            table = _build_table(f"stretch, {name}")
            for kind, readings in measure_stretch(reader, pages, seed).items():
                _add_row(table, kind, readings, tokens)
            console.print(table)


if __name__ == "__main__":
    typer.run(main)
