"""What templates may ask of the results: figures, and lines of tables with their aims. Pure.

A figure that was not measured is said to be so, wherever it stands; an aim that was not reached is remembered, so that
the page can list it whether its author likes that or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.documents import Document
from benchmarks.fastpath.rows import Row

UNMEASURED = "not measured"


def number(value: float | None) -> str:
    """Three significant digits, thousands with commas: 0.0312, 1.07, 32.3, 1,149."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = round(value, digits)
    return f"{rounded:,.{digits if rounded != int(rounded) or abs(rounded) < 10 else 0}f}"


@dataclass(frozen=True, slots=True)
class Miss:
    """An aim that was not reached."""

    measure: str
    wanted: str
    measured: str


@dataclass
class Figures:
    """All results, and what the templates made of them."""

    documents: Mapping[str, Document]
    misses: list[Miss] = field(default_factory=list)

    def row(self, benchmark: str, measure: str, peer: str = "", unit: str = "") -> Row | None:
        """The first that begins so; None when it was not measured."""
        document = self.documents.get(benchmark)
        for row in document.rows if document else ():
            if row.measure.startswith(measure) and row.peer_name.startswith(peer) and row.unit.startswith(unit):
                return row
        return None

    def ours(self, benchmark: str, measure: str, peer: str = "", unit: str = "") -> str:
        row = self.row(benchmark, measure, peer, unit)
        return number(row.ours) if row else UNMEASURED

    def theirs(self, benchmark: str, measure: str, peer: str = "", unit: str = "") -> str:
        row = self.row(benchmark, measure, peer, unit)
        return number(row.peer) if row else UNMEASURED

    def ratio(self, benchmark: str, measure: str, peer: str = "", unit: str = "") -> str:
        row = self.row(benchmark, measure, peer, unit)
        return number(row.ratio) if row else UNMEASURED

    def get(self, benchmark: str, *path: str) -> Any:
        """A part of a result that is no row; None when it is not there."""
        found: Any = self.documents[benchmark].result if benchmark in self.documents else None
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def line(
        self,
        title: str,
        benchmark: str,
        measure: str,
        peer: str = "",
        unit: str = "",
        *,
        shown: str | None = None,
        with_floor: bool = False,
        at_most: float | None = None,
        at_least: float | None = None,
        ratio_at_least: float | None = None,
    ) -> str:
        """One line of a table: title, ours, peer, floor on demand, ratio, aim. `shown` is the unit as it is printed."""
        row = self.row(benchmark, measure, peer, unit)
        shown = (row.unit if row else unit) if shown is None else shown
        aim, is_reached = _judge(row, shown, at_most, at_least, ratio_at_least)
        floor = ["-" if row is None or row.floor is None else f"{number(row.floor)} {shown}"] if with_floor else []
        if row is None:
            return f"| {title} | {UNMEASURED} | - | {''.join(f'{each} | ' for each in floor)}- | {aim} |"
        if not is_reached:
            measured = number(row.ratio) if ratio_at_least is not None else f"{number(row.ours)} {shown}"
            self.misses.append(Miss(title, aim, measured))
        theirs = f"{number(row.peer)} {shown}, {row.peer_name}"
        cells = [title, f"{number(row.ours)} {shown}", theirs, *floor, number(row.ratio), aim]
        return f"| {' | '.join(cells)} |"


def _judge(
    row: Row | None, unit: str, at_most: float | None, at_least: float | None, ratio_at_least: float | None
) -> tuple[str, bool]:
    """The aim in words, and whether it is reached; an aim on what was not measured counts as neither."""
    if at_most is not None:
        return f"at most {at_most:g} {unit}", row is None or row.ours <= at_most
    if at_least is not None:
        return f"at least {at_least:,g} {unit}", row is None or row.ours >= at_least
    if ratio_at_least is not None:
        return f"{ratio_at_least:g} times", row is None or (row.ratio is not None and row.ratio >= ratio_at_least)
    return "", True
