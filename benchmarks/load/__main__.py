"""`python -m benchmarks.load`: a minute of realistic users against a stack, a summary, an HTML page and JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.load.arrivals import Shape
from benchmarks.router.stack import CONFIG, run_stack

app = typer.Typer(add_completion=False)

_LOCAL = "http://127.0.0.1:8000"
_LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"


@app.command()
def main(
    url: Annotated[str, typer.Option(help="Where the stack listens.")] = _LOCAL,
    seconds: Annotated[float, typer.Option(min=1, help="How long users come.")] = 60.0,
    rate: Annotated[float, typer.Option(help="Users per second, mean; each reads two pages or so.")] = 1.0,
    arrivals: Annotated[Shape, typer.Option(help="When they come.")] = Shape.POISSON,
    workers: Annotated[int, typer.Option(min=1, help="Processes that users are spread over.")] = 1,
    model: Annotated[str, typer.Option(help="What they ask for.")] = "nano",
    seed: Annotated[int, typer.Option(help="Of the schedule and of what users do.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")] = Path("build/load"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Another place for the summary.")] = None,
) -> None:
    """Let users come at their own pace, and say what they saw.

    Without a stack at the local default address one is started with configs/local.yaml and stopped at the end. A key is
    taken from the variable SERVING_API_KEY.
    """
    console = Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    summary_file = out / "summary.json"
    summary_file.unlink(missing_ok=True)
    with find_stack(url, console) as address:
        console.print(f"{seconds:g} s of users ({arrivals}, {rate:g} a second) against {address}", highlight=False)
        command = [sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--host", address, "--headless"]
        command += ["--arrivals", arrivals, "--rate", str(rate), "--seconds", str(seconds), "--seed", str(seed)]
        command += ["--model", model, "--html", str(out / "report.html"), "--summary", str(summary_file)]
        command += ["--only-summary", "--loglevel", "WARNING"]
        if workers > 1:
            command += ["--processes", str(workers)]
        with (out / "locust.log").open("wb") as log:
            status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if not summary_file.exists():
        console.print((out / "locust.log").read_text(errors="replace")[-2000:], markup=False)
        raise typer.Exit(status or 1)
    summary = json.loads(summary_file.read_text())
    console.print(build_table(summary))
    console.print(f"{out / 'report.html'}, {summary_file}")
    if json_file is not None:
        json_file.write_text(json.dumps(summary) + "\n")
    raise typer.Exit(status)


@contextlib.contextmanager
def find_stack(url: str, console: Console) -> Iterator[str]:
    """The address of a stack: the one that is there, or one that runs as long as the context."""
    if is_ready(url):
        yield url
    elif url == _LOCAL:
        console.print(f"nobody serves at {url}: starting a stack with {CONFIG} (half a minute or so)", highlight=False)
        with run_stack() as stack:
            yield stack.url
    else:
        console.print(
            f"nobody serves at {url}: start a stack there (`make serve`), or leave --url out to have one started"
        )
        raise typer.Exit(1)


def is_ready(url: str) -> bool:
    """A stack's own answer, or that of a bare vLLM server."""
    for path in ("/ready", "/health"):
        with contextlib.suppress(OSError), urllib.request.urlopen(url + path, timeout=5):
            return True
    return False


def build_table(summary: dict[str, Any]) -> Table:
    """For people."""
    table = Table(title=f"{summary['requests']} requests of {summary['visits']} visits in {summary['took_s']:.0f} s")
    for column in ("", "value", "p50", "p90", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for outcome, count in summary["outcomes"].items():
        table.add_row(outcome, str(count))
    for title, key, shown in (
        ("refused (429, 503)", "num_refused", "{:d}"),
        ("errors", "num_errors", "{:d}"),
        ("pages/s", "pages_per_s", "{:.2f}"),
        ("output tokens/s", "tokens_per_s", "{:.0f}"),
        ("cost, $", "dollars", "{:.6f}"),
    ):
        table.add_row(title, shown.format(summary[key]))
    for title, key in (
        ("time to first token, ms", "first_s"),
        ("between tokens, ms", "gap_s"),
        ("whole answer, ms", "whole_s"),
        ("late, the generator itself, ms", "late_s"),
    ):
        times = [1e3 * summary[key].get(name, math.nan) for name in ("mean", "p50", "p90", "p99")]
        table.add_row(title, *(f"{time:.1f}" for time in times))
    for reason, count in {**summary["refusals"], **summary["errors"]}.items():
        table.add_row(f"  {reason}", str(count))
    return table


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "120")
    app()
