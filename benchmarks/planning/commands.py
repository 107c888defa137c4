"""The commands of `python -m benchmarks.planning`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measure what `serving plan` counts with, and whether its simulation comes true."""


CheckedEngine = Literal["nano", "scripted"]
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


@app.command()
def calibrate(
    url: Annotated[str, typer.Option(help="A router with one engine replica behind it.")],
    model: Annotated[str, typer.Option(help="Its model.")],
    max_seqs: Annotated[int, typer.Option(help="Sequences that the engine runs at once (max_num_seqs).")],
    kv_tokens: Annotated[int, typer.Option(help="What its KV cache holds; GET /admin/state has it.")],
    mode: Annotated[str | None, typer.Option(help="Resolution mode; the server's own by default.")] = None,
    concurrency: Annotated[str, typer.Option(help="Clients at once, several between commas.")] = "1,8,32,96",
    lengths: Annotated[str, typer.Option(help="Tokens of an answer, several between commas.")] = "16,256",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    key: Annotated[str | None, typer.Option(envvar="SERVING_API_KEY", help="For the router.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure how long an engine's work takes, for `serving plan --curve`. The engine must have nothing else to do."""
    from benchmarks.planning import check as checking
    from benchmarks.planning.clients import Reader, a4_images
    from benchmarks.planning.comparison import Calibration

    reader = Reader(url.rstrip("/"), model, a4_images(), mode, key)
    grid = [(int(number), int(length)) for number in concurrency.split(",") for length in lengths.split(",")]
    calibration = Calibration()
    for _ in track(range(rounds), description="calibrating"):
        asyncio.run(checking.calibrate(reader, calibration, grid))
    fit = calibration.fit(max_seqs, kv_tokens)
    Console().print(f"{fit.curve}\nmisses the measured times by {fit.worst_error:.1%} at most")
    if json_file is not None:
        source = f"measured at {url}, model {model}, {datetime.now(UTC):%Y-%m-%d}; fits to {fit.worst_error:.0%}"
        points = [dataclasses.asdict(point) for point in calibration.points()]
        told = {"curve": dataclasses.asdict(fit.curve), "source": source, "points": points}
        json_file.write_text(json.dumps(told, indent=2) + "\n")


@app.command()
def check(
    engine: Annotated[CheckedEngine, typer.Option(help="What runs: the nano stack, or a scripted engine.")] = "nano",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of calibration and loads.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of arrivals at random in each.")] = 20.0,
    json_file: JsonOption = None,
) -> None:
    """Calibrate a stack, predict other loads with the simulation, apply them, and compare; exit 1 beyond 15%.

    The scripted engine's times are clockwork: with it only waiting and the router are put to the test.
    """
    from benchmarks.planning import check as checking
    from benchmarks.planning.comparison import TOLERANCE, Measured

    console = Console()
    with checking.run_nano() if engine == "nano" else checking.run_scripted() as (reader, max_seqs, kv_tokens):
        measured = Measured(max_seqs, kv_tokens)
        asyncio.run(checking.Check(reader, measured, seconds, console.print).run(rounds))
    fit, rows = measured.compare()
    table = Table(
        "load", "figure", "predicted", "measured", "unit", "error", title=f"The simulation beside the {engine} stack"
    )
    for row in rows:
        numbers = (f"{row.predicted:.3g}", f"{row.measured:.3g}", row.unit, f"{row.error:+.1%}")
        table.add_row(row.load, row.figure, *numbers)
    console.print(table)
    console.print(f"{fit.curve}\nmisses the calibration's times by {fit.worst_error:.1%} at most")
    if json_file is not None:
        result = checking.to_json(fit, rows, measured)
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    raise typer.Exit(0 if all(abs(row.error) <= TOLERANCE for row in rows) else 1)
