"""`python -m benchmarks.fastpath`: prints the table and writes its rows."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fastpath import MEASURES
from benchmarks.fastpath.rows import Row

app = typer.Typer(add_completion=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"A measure; may be given again: {', '.join(MEASURES)}.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the rows.")] = None,
) -> None:
    """Measure the plugin's fast path against stock vLLM's own code, called in the same run."""
    unknown = set(only or ()) - set(MEASURES)
    if unknown:
        raise typer.BadParameter(f"no measure {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    rows = [row for name in only or MEASURES for row in importlib.import_module(MEASURES[name]).run()]
    Console().print(build_table(rows))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def build_table(rows: Iterable[Row]) -> Table:
    """The rows for people, three significant digits each."""
    table = Table(title="Fast path, ours beside stock vLLM")
    table.add_column("measure")
    for column in ("ours", "peer", "floor", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("peer is")
    for row in rows:
        figures = ("" if value is None else f"{value:.3g}" for value in (row.ours, row.peer, row.floor, row.ratio))
        table.add_row(row.measure, *figures, row.unit, row.peer_name)
    return table


if __name__ == "__main__":
    app()
