"""Measure a checkpoint on pages it never saw: `python -m serving.demo.measure --checkpoint DIR`.

This runs the plain PyTorch model; the same pages can be posted to a running stack instead.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from serving.demo.batches import OCR_PROMPT, Batch
from serving.demo.metrics import character_error_rate
from serving.demo.model import NanoOcr, load_model
from serving.demo.pages import CORE, WIDE, Page, PageSpec, sample_page, with_chars
from serving.demo.tokenizer import decode_ids

_BATCH_PAGES = 16


@dataclass(frozen=True)
class Reading:
    """A page, what was read from it and the character error rate of that."""

    page: Page
    read: str
    rate: float


def read_pages(model: NanoOcr, pages: list[Page], max_tokens: int = 480) -> list[str]:
    """Read pages greedily with the default prompt."""
    texts: list[str] = []
    for start in range(0, len(pages), _BATCH_PAGES):
        batch = Batch.from_pages(pages[start : start + _BATCH_PAGES], model.sizes)
        texts += [decode_ids(ids) for ids in model.generate(batch.pages, OCR_PROMPT, max_tokens)]
    return texts


def measure_pages(model: NanoOcr, spec: PageSpec, num_pages: int, seed: int) -> list[Reading]:
    """Read `num_pages` held-out pages of a specification."""
    pages = [sample_page(spec, "test", seed, index) for index in range(num_pages)]
    texts = read_pages(model, pages)
    return [Reading(p, text, character_error_rate(text, p.text)) for p, text in zip(pages, texts, strict=True)]


def _add_groups(table: Table, readings: list[Reading], name: str, key: Callable[[Page], object]) -> None:
    groups: dict[object, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(key(reading.page), []).append(reading)
    for value in sorted(groups, key=str):
        _add_row(table, f"{name} {value}", groups[value])


def _add_row(table: Table, name: str, readings: Iterable[Reading]) -> None:
    rows = list(readings)
    rates = np.array([row.rate for row in rows])
    chars = float(np.mean([len(row.page.text) for row in rows]))
    figures = (rates.mean(), np.median(rates), rates.max(), (rates == 0).mean())
    table.add_row(name, str(len(rows)), f"{chars:.0f}", f"{chars / 64:.1f}", *(f"{100 * x:.2f}%" for x in figures))


def build_table(title: str, readings: list[Reading]) -> Table:
    """Return error rates overall and by characters, lines, font and size."""
    table = Table(title=title)
    for column in ("pages", "count", "characters", "per vision token", "mean", "median", "worst", "exact"):
        table.add_column(column, justify="left" if column == "pages" else "right")
    _add_row(table, "all", readings)
    _add_groups(table, readings, "characters from", lambda page: f"{len(page.text) // 50 * 50:03}")
    _add_groups(table, readings, "lines", lambda page: f"{page.text.count(chr(10)) + 1:02}")
    _add_groups(table, readings, "font", lambda page: page.style.font)
    _add_groups(table, readings, "size", lambda page: page.style.font_size_px)
    return table


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint directory.")] = Path("checkpoints/nano"),
    pages: Annotated[int, typer.Option(help="Pages per specification.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the held-out pages.")] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print character error rates on held-out pages."""
    import torch

    torch.set_num_threads(threads)
    model = load_model(checkpoint)
    for name, spec in (("core", CORE), ("wide", WIDE)):
        readings = measure_pages(model, with_chars(spec, 100, 350), pages, seed)
        Console(width=110).print(build_table(name, readings))


if __name__ == "__main__":
    typer.run(main)
