"""`python -m benchmarks.router`: prints the table and writes its rows."""

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

from benchmarks.fastpath.rows import Row
from benchmarks.router import MEASURES

app = typer.Typer(add_completion=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"A measure; may be given again: {', '.join(MEASURES)}.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the rows; with --only, others in it stay.")
    ] = None,
) -> None:
    """Measure the router beside its peers, all in the same run."""
    unknown = set(only or ()) - set(MEASURES)
    if unknown:
        raise typer.BadParameter(f"no measure {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    rows: list[Row] = []
    for name in only or MEASURES:
        rows += importlib.import_module(MEASURES[name]).run()
        if json_file is not None:  # after each, so that a measure that breaks loses only itself
            write_rows(json_file, rows, keeps_others=bool(only))
    Console().print(build_table(rows))


def write_rows(file: Path, rows: list[Row], *, keeps_others: bool) -> None:
    """Write the rows; others of the file are kept in their place on demand."""
    new = {(row.measure, row.peer_name, row.unit): dataclasses.asdict(row) for row in rows}
    old = json.loads(file.read_text()) if keeps_others and file.exists() else []
    known = {(row["measure"], row["peer_name"], row["unit"]): row for row in old}
    file.write_text(json.dumps(list({**known, **new}.values()), indent=2) + "\n")


def build_table(rows: Iterable[Row]) -> Table:
    """The rows for people, three significant digits each."""
    table = Table(title="The router, beside what others put in its place")
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
