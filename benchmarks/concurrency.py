"""`python -m benchmarks.concurrency`: throughput and latencies against the number of requests at a time, nano stack.

Three servers with the same weights and the same engine arguments (configs/local.yaml) read the same pages in turns: the
whole stack, a bare vLLM server with the plugin, and a bare vLLM server with vLLM's own model code. Answers have a fixed
length, so that all three do the same work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fastpath.rows import Row
from benchmarks.fastpath.running import GUARD_REQUEST, STOCK_GUARD, STOCK_SERVER
from benchmarks.pages_client import run_client
from benchmarks.router.stack import BARE, CONFIG, STACK, run_bare, run_stack
from benchmarks.stock import SIZES_FILE
from serving.nano.build import build_checkpoint
from serving.nano.config import NANO
from serving.settings.stack import load_settings

app = typer.Typer(add_completion=False)

STOCK = "bare vLLM server, stock code"
NUM_TOKENS = 128
_LENGTH = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
_WARM_PAGES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One server under measure; `extra` is of every request's body."""

    name: str
    url: str
    extra: dict[str, Any]


@contextlib.contextmanager
def run_sides() -> Any:
    """All three, ready."""
    settings = load_settings(CONFIG, {})
    model = next(iter(settings.models))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        checkpoint = build_checkpoint(Path(folder) / "nano")
        (checkpoint / SIZES_FILE).write_text(json.dumps(dataclasses.asdict(NANO)))
        stack = servers.enter_context(run_stack())
        bare = servers.enter_context(run_bare(settings, model, checkpoint))
        stock = servers.enter_context(run_bare(settings, model, checkpoint, *STOCK_GUARD, module=STOCK_SERVER))
        yield (
            model,
            [
                Side(STACK, stack.url, _LENGTH),
                Side(BARE, bare.url, _LENGTH),
                Side(STOCK, stock.url, {**_LENGTH, **GUARD_REQUEST}),
            ],
        )


def measure(levels: list[int], num_pages: int) -> dict[str, dict[str, Any]]:
    """By side and level, what came."""
    with run_sides() as (model, sides):
        for side in sides:  # first requests pay for what is only done once
            run_client(side.url, model, num_pages=_WARM_PAGES, concurrency=2, extra=side.extra)
        curves: dict[str, dict[str, Any]] = {side.name: {} for side in sides}
        turns = [(level, side) for level in levels for side in sides]
        for level, side in track(turns, description="reading pages"):
            number = max(level, min(num_pages, 12 * level))
            curves[side.name][str(level)] = run_client(
                side.url, model, num_pages=number, concurrency=level, extra=side.extra
            )
    return curves


def build_rows(curves: dict[str, dict[str, Any]]) -> list[Row]:
    """The stack beside each of the others at every level."""
    rows = []
    for level, ours in curves[STACK].items():
        for peer in (BARE, STOCK):
            theirs = curves[peer][level]
            pages = (ours["pages_per_s"], theirs["pages_per_s"])
            rows.append(Row.of_rates(f"pages read, nano checkpoint, c={level}", *pages, peer, None, "pages/s"))
            first = (ours["first_s"]["p50"], theirs["first_s"]["p50"])
            rows.append(Row.of_costs(f"time to first token of a page, c={level}, p50", *first, peer, None, "s"))
    return rows


def build_table(curves: dict[str, dict[str, Any]]) -> Table:
    """For people."""
    table = Table(title=f"Pages of 512 pixels, {NUM_TOKENS} tokens out")
    for column in ("server", "at a time", "pages/s", "tokens/s", "first token p50", "p99", "between p50", "p99"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for name, levels in curves.items():
        for level, seen in levels.items():
            times = (seen["first_s"]["p50"], seen["first_s"]["p99"], seen["gap_s"]["p50"], seen["gap_s"]["p99"])
            rates = (f"{seen['pages_per_s']:.2f}", f"{seen['tokens_per_s']:.0f}")
            table.add_row(name, level, *rates, *(f"{1e3 * time:.0f} ms" for time in times))
    return table


@app.command()
def main(
    levels: Annotated[str, typer.Option(help="Requests at a time, several between commas.")] = "1,2,4,8,16,32",
    pages_per_level: Annotated[int, typer.Option(min=1, help="At most; fewer at low levels.")] = 96,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write rows and curves.")] = None,
) -> None:
    """Read pages through three servers at several levels of concurrency."""
    curves = measure([int(level) for level in levels.split(",")], pages_per_level)
    Console(width=140).print(build_table(curves))
    if json_file is not None:
        rows = [dataclasses.asdict(row) for row in build_rows(curves)]
        json_file.write_text(json.dumps({"rows": rows, "curves": curves}) + "\n")


if __name__ == "__main__":
    app()
