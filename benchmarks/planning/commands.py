"""The commands of `python -m benchmarks.planning`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measure what `serving plan` counts with, and whether its simulation comes true."""


JsonOption = Annotated[Path | None, typer.Option("--json", help="Where to write the result.")]


@app.command()
def figures(
    database_url: Annotated[str | None, typer.Option(help="An empty PostgreSQL database; without it left out.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure what a page costs outside of the model: CPU time and bytes, router, network and ledger."""
    from benchmarks.planning.figures import measure

    table = Table("measure", "value", "unit", title="A page outside of the model")
    rows = list(measure(database_url))
    for row in rows:
        table.add_row(row.measure, f"{row.value:,.4g}", row.unit)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
