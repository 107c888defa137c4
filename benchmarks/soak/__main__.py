"""`python -m benchmarks.soak`: a stack under load, departures and kills for a quarter of an hour, and a verdict."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.documents import RESULTS, Document, write_document
from benchmarks.faults.__main__ import VICTIMS, build_settings, kill, wait_until_whole, work_left
from benchmarks.faults.client import Load
from benchmarks.faults.stack import RunningStack, run_stack
from benchmarks.machine import describe_run
from benchmarks.soak.verdict import Check, find_growth, judge_books, judge_growth, judge_requests
from benchmarks.soak.watch import Watch

app = typer.Typer(add_completion=False)

REPLICAS, ROUTERS = 2, 2
WANTED = {"replica": REPLICAS, "router": ROUTERS, "directory": 1}
CLIENTS: dict[str, Any] = {"num_streams": 24, "num_whole": 24, "num_leaving": 8}
CALM_PART = 0.3
"""At the end there is load and no more kills, so that what lives then shows whether it grows."""
_HEALED_WITHIN_S = 60.0
_SETTLED_WITHIN_S = 90.0
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Kills:
    """How often each part died, and the longest that it took to be whole again."""

    times: Counter[str] = field(default_factory=Counter)
    worst_s: dict[str, float] = field(default_factory=dict)

    def judge(self) -> Check:
        found = ", ".join(f"{part} {count} times, {self.worst_s[part]:.1f} s" for part, count in self.times.items())
        return Check(
            f"every kill heals within {_HEALED_WITHIN_S:g} s",
            found or "none",
            all(seconds < _HEALED_WITHIN_S for seconds in self.worst_s.values()),
        )


async def soak(stack: RunningStack, load: Load, minutes: float, kill_every_s: float) -> Kills:
    """Load from the first second to the last; kills in turn until the calm part."""
    kills = Kills()
    running = asyncio.create_task(load.run())
    began_s, turn = time.monotonic(), 0
    until_s, kills_until_s = began_s + 60 * minutes, began_s + 60 * minutes * (1 - CALM_PART)
    columns = (TextColumn("{task.description:34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("soaking", total=60 * minutes)
        due_s = began_s + min(kill_every_s, 10.0)
        while (now_s := time.monotonic()) < until_s and not running.done():
            progress.update(bar, completed=now_s - began_s)
            if due_s <= now_s < kills_until_s:
                victim = VICTIMS[turn % len(VICTIMS)]
                progress.update(bar, description=f"soaking; killing: {victim}")
                pid, killed_s = await kill(stack, victim), time.monotonic()
                healed_s = await wait_until_whole(stack, pid, WANTED, killed_s)
                kills.times[victim] += 1
                kills.worst_s[victim] = max(healed_s, kills.worst_s.get(victim, 0.0))
                turn, due_s = turn + 1, max(time.monotonic(), due_s + kill_every_s)
                progress.update(bar, description="soaking")
            await asyncio.sleep(0.5)
    load.stop()
    await running
    return kills


def read_rows(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Outcome, completion tokens and cost of every request in the ledger."""
    query = "SELECT request_id, outcome, completion_tokens, cost_nanodollars FROM requests"
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'ledger.db'}?mode=ro", uri=True)) as connection:
        return {row[0]: (row[1], row[2], row[3]) for row in connection.execute(query)}


def reconcile(stack: RunningStack, config: Path) -> Check:
    """`serving billing reconcile` over the replicas that live; those that were killed have nobody left to ask."""
    replicas = {entry["replica_id"]: entry["base_url"] for entry in stack.get("/admin/state")["replicas"]}
    command = [str(Path(sys.executable).with_name("serving")), "billing", "reconcile", "--config", str(config)]
    command += [part for name, url in replicas.items() for part in ("--replica", f"{name}={url}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = "difference 0" if done.returncode == 0 else done.stdout.strip() or done.stderr.strip()
    return Check(
        f"`serving billing reconcile`: ledger and engines' counters agree ({len(replicas)} live replicas)",
        found,
        done.returncode == 0,
    )


def settle(stack: RunningStack, folder: Path, load: Load) -> list[Check]:
    """The books, as soon as they are right, or at the end of the patience for a dead router's journal."""
    deadline_s = time.monotonic() + _SETTLED_WITHIN_S
    while True:
        checks = [*judge_books(load.told, read_rows(folder / "billing")), reconcile(stack, folder / "settings.yaml")]
        if all(check.is_kept for check in checks) or time.monotonic() > deadline_s:
            return checks
        time.sleep(2)


@app.command()
def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="How long.")] = 15.0,
    kill_every_s: Annotated[float, typer.Option(min=5, help="Between two kills.")] = 30.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write the result; benchmarks/results/soak.json without it.")
    ] = None,
) -> None:
    """Soak a stack of scripted engines: 56 clients, a kill now and then, a verdict. Status 1 when it is not kept.

    The plot of memory and descriptors is drawn beside the report (benchmarks/plots/soak.svg).
    """
    about = describe_run(_ROOT, f"python -m benchmarks.soak --minutes {minutes:g}", "full")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = build_settings(REPLICAS, ROUTERS)
        settings["billing"] = {"directory": str(folder / "billing"), "flush_s": 0.2, "spool": {"adopt_s": 0.5}}
        settings["models"]["nano"]["price"] = {"input_per_million": 3, "output_per_million": 10}
        with run_stack(settings, folder) as stack:
            load = Load(stack.url, "nano", **CLIENTS)
            with Watch(stack) as watch:
                kills = asyncio.run(soak(stack, load, minutes, kill_every_s))
            left = work_left(stack)
            books = settle(stack, folder, load)
    series = list(watch.series.values())
    checks = [
        *judge_requests(load.streams, load.whole, load.lost, load.num_left, kills.times),
        kills.judge(),
        Check("no work is left in the routers when all have gone", f"{left} tokens", left == 0),
        *judge_growth(find_growth(series, sum(CLIENTS.values()))),
        *books,
    ]
    result: dict[str, Any] = {
        "minutes": minutes,
        "kill_every_s": kill_every_s,
        "checks": [asdict(check) for check in checks],
        "streams": {str(seen): count for seen, count in load.streams.items()},
        "whole": {str(seen): count for seen, count in load.whole.items()},
        "kills": dict(kills.times),
        "series": [each.thinned() for each in series],
    }
    report(checks, minutes)
    if json_file is not None:
        json_file.write_text(json.dumps(result) + "\n")
    else:
        write_document(Document("soak", {**about, "took_s": round(time.monotonic() - began_s, 1)}, result), RESULTS)
        from benchmarks.report.render import write_report

        print(f"wrote {write_report().relative_to(_ROOT)}")
    raise typer.Exit(0 if all(check.is_kept for check in checks) else 1)


def report(checks: list[Check], minutes: float) -> None:
    """The verdict, for people."""
    table = Table(title=f"{minutes:g} minutes")
    for column in ("asked", "found", ""):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.asked, check.found, "kept" if check.is_kept else "NOT KEPT")
    Console(width=150).print(table)


if __name__ == "__main__":
    app()
