"""`python -m benchmarks.check`: the ratios of benchmarks/results/ beside those that are committed as the baseline.

Ratios only: ours against a peer that was measured in the same command on the same machine. Times say more of a machine
and of what else ran on it than of a change, so they are never compared. A ratio that has fallen by more than its
tolerance is a regression; one that has risen is told, and becomes the baseline with `--accept`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.documents import RESULTS, Document, read_documents

app = typer.Typer(add_completion=False)

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.35
"""Part by which a ratio may fall: ratios of repeated runs on two shared cores differ by up to a quarter."""
TOLERANCES = {
    "balance_sim: ": 0.01,  # a simulation with a seed
    "fastpath.images: bytes": 0.01,
    "fastpath.reading: nano checkpoint, answers equal": 0.02,
    "fastpath.reading: nano checkpoint, a mix in mode auto: CER": 0.6,  # of a handful of wrong characters
    "router.first_token: added": 0.6,  # differences of tenths of milliseconds
    "faults: ": 0.05,
    "scaling: ": 0.2,
    "ledger: ": 0.5,  # against fsync and transactions, whose time is the disk's
}
"""By the beginning of a ratio's name; the longest that fits holds."""


class Verdict(StrEnum):
    KEPT = "kept"
    BETTER = "better"
    WORSE = "worse"
    NEW = "new"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Line:
    """One ratio. `before` and `now` are None where there is none."""

    name: str
    before: float | None
    now: float | None
    tolerance: float

    @property
    def verdict(self) -> Verdict:
        if self.before is None:
            return Verdict.NEW
        if self.now is None:
            return Verdict.MISSING
        if self.now < self.before * (1 - self.tolerance):
            return Verdict.WORSE
        return Verdict.BETTER if self.now > self.before * (1 + self.tolerance) else Verdict.KEPT


def find_ratios(documents: Mapping[str, Document]) -> dict[str, float]:
    """Every ratio by `benchmark: measure, beside peer, unit`."""
    return {
        f"{name}: {row.measure}, beside {row.peer_name}, {row.unit}": row.ratio
        for name, document in documents.items()
        for row in document.rows
        if row.ratio is not None
    }


def find_tolerance(name: str) -> float:
    """Of the longest beginning that fits."""
    fitting = [beginning for beginning in TOLERANCES if name.startswith(beginning)]
    return TOLERANCES[max(fitting, key=len)] if fitting else TOLERANCE


def compare(before: Mapping[str, float], now: Mapping[str, float]) -> list[Line]:
    """All ratios of both, in the order of the baseline, new ones last."""
    names = [*before, *(name for name in now if name not in before)]
    return [Line(name, before.get(name), now.get(name), find_tolerance(name)) for name in names]


def is_good(lines: list[Line]) -> bool:
    """Whether nothing got worse and nothing is missing."""
    return all(line.verdict not in (Verdict.WORSE, Verdict.MISSING) for line in lines)


def build_table(lines: list[Line]) -> Table:
    """Whatever was not simply kept, for people."""
    table = Table(title="Ratios beside the baseline")
    for column in ("ratio of", "before", "now", "may fall by", ""):
        table.add_column(column, justify="left" if column in ("ratio of", "") else "right")
    for line in lines:
        if line.verdict is not Verdict.KEPT:
            figures = ("-" if value is None else f"{value:.3g}" for value in (line.before, line.now))
            table.add_row(line.name, *figures, f"{line.tolerance:.0%}", line.verdict)
    return table


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of results.")] = RESULTS,
    baseline: Annotated[Path, typer.Option(help="The ratios to compare with.")] = BASELINE,
    accept: Annotated[bool, typer.Option("--accept", help="Make these results the baseline.")] = False,
) -> None:
    """Compare the ratios of the results with the committed ones; status 1 when one got worse or is missing."""
    now = find_ratios(read_documents(results))
    if accept:
        baseline.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        print(f"{len(now)} ratios are the baseline now")
        return
    lines = compare(json.loads(baseline.read_text()), now)
    console = Console(width=160)
    console.print(build_table(lines))
    counts = {verdict: sum(line.verdict is verdict for line in lines) for verdict in Verdict}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    raise typer.Exit(0 if is_good(lines) else 1)


if __name__ == "__main__":
    app()
