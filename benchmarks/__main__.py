"""`python -m benchmarks`: runs every benchmark, keeps its figures, draws the plots and writes benchmarks/README.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import effort as efforts
from benchmarks.documents import Document, write_document
from benchmarks.effort import Effort
from benchmarks.machine import describe_run
from benchmarks.registry import BENCHMARKS, Benchmark, choose

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "benchmarks"
_TIMEOUT_S = 3600.0

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one benchmark ended; `reason` is empty when it brought its figures."""

    name: str
    took_s: float
    reason: str = ""


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help="A benchmark (`router.chunks`) or a group (`router`); may be given again.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every round: over an hour, instead of about thirty-five minutes.")
    ] = False,
    must_list: Annotated[bool, typer.Option("--list", help="Say what there is, and end.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: plots and README from the results that are there.")
    ] = False,
) -> None:
    """Run the benchmarks, write benchmarks/results/*.json, draw the plots and render benchmarks/README.md.

    A benchmark that fails leaves its former result, and the command ends with status 1. Timings want a machine that
    does nothing else: the load before each benchmark is written beside its figures.
    """
    console = Console()
    effort = Effort.FULL if full else Effort.QUICK
    try:
        chosen = choose(only or [], effort)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if must_list:
        for benchmark in BENCHMARKS:
            console.print(f"{benchmark.name:22} {benchmark.about}", highlight=False)
        return
    endings = [] if report_only else run_all(chosen, effort, console)
    from benchmarks.report.render import write_report  # matplotlib: seconds that --list need not wait for

    console.print(f"wrote {write_report().relative_to(ROOT)}")
    for ending in endings:
        if ending.reason:
            console.print(f"{ending.name}: {ending.reason}", style="red", markup=False, highlight=False)
    raise typer.Exit(1 if any(ending.reason for ending in endings) else 0)


def run_all(chosen: list[Benchmark], effort: Effort, console: Console) -> list[Ending]:
    """One after the other, never two at once: they would measure each other."""
    columns = (TextColumn("{task.description:34}"), BarColumn(), TimeElapsedColumn())
    endings = []
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all", total=sum(each.minutes for each in chosen))
        for benchmark in chosen:
            progress.update(total, description=f"{benchmark.name} (about {benchmark.minutes:g} min)")
            ending = run_one(benchmark, effort)
            endings.append(ending)
            progress.advance(total, benchmark.minutes)
            word = "FAILED" if ending.reason else "done"
            progress.console.print(f"{benchmark.name:22} {word:6} {ending.took_s:6.0f} s", highlight=False)
        progress.update(total, description="all")
    return endings


def run_one(benchmark: Benchmark, effort: Effort) -> Ending:
    """In a process of its own, whose output is kept in `build/benchmarks/`."""
    if obstacle := benchmark.find_obstacle():
        return Ending(benchmark.name, 0.0, obstacle)
    LOGS.mkdir(parents=True, exist_ok=True)
    log, out = LOGS / f"{benchmark.name}.log", LOGS / f"{benchmark.name}.json"
    out.unlink(missing_ok=True)
    arguments = ["-m", benchmark.module, *benchmark.arguments_for(effort), "--json", str(out)]
    about = describe_run(ROOT, " ".join(["python", *arguments[:-2]]), effort)
    environment = {**os.environ, efforts.VARIABLE: effort, "COLUMNS": "140"}
    began_s = time.monotonic()
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output,
                timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Ending(benchmark.name, _TIMEOUT_S, f"not done within {_TIMEOUT_S:g} s; see {log}")
    took_s = time.monotonic() - began_s
    if out.exists():  # some say by their status that a figure is bad, and write it nevertheless
        write_document(Document(benchmark.name, {**about, "took_s": round(took_s, 1)}, json.loads(out.read_text())))
    if done.returncode:
        tail = log.read_text(errors="replace")[-600:].strip()
        return Ending(benchmark.name, took_s, f"ended with status {done.returncode}; {log} ends with:\n{tail}")
    return Ending(benchmark.name, took_s)


if __name__ == "__main__":
    app()
