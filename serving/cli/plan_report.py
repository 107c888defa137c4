"""Computes and prints the plan of `serving plan`, and how sensitive it is to its assumptions."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from serving.errors import SettingsError
from serving.planning.curve import ServiceCurve
from serving.planning.figures import Basis, Figures, load_figures
from serving.planning.plan import MeasuredCurve, PlanQuestion, build_plan
from serving.planning.sheet import PlanSheet
from serving.planning.sizing import PlanError

_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_VARIATIONS = (
    ("alone_tokens_per_s", 0.5),
    ("alone_tokens_per_s", 2.0),
    ("published_tokens_per_s", 2.0),
    ("output_tokens", 0.5),
    ("output_tokens", 1.5),
    ("output_spread", 1.5),
)
"""The figures of engine and pages that the plan depends on most, and the factors to try for each."""


def report_plan(
    *,
    pages_per_day: float,
    mode: str,
    slo_p95: str,
    daily_curve: str | None,
    given: list[str],
    named: dict[str, float | None],
    curve: Path | None,
    figures_file: Path | None,
    varies: bool,
    is_json: bool,
) -> None:
    """Print the plan for the options of `serving plan`; exits with status 2 if one of them is wrong."""
    console = Console(stderr=True)
    try:
        figures = load_figures(figures_file).with_values({**_parse_given(given), **named})
        measured = _load_curve(curve) if curve else None
        question = PlanQuestion(pages_per_day, mode, _parse_seconds(slo_p95), _parse_curve(daily_curve), measured)
        with console.status("planning") as status:
            sheet = build_plan(question, figures, status.update)
            rows = _vary(question, figures, sheet, status.update) if varies else []
    except (PlanError, SettingsError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    if is_json:
        typer.echo(json.dumps(_to_json(question, sheet, rows), indent=2))
    else:
        _print(question, sheet, rows)


def _parse_seconds(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise PlanError(f"--slo-p95 {text!r} is not a time: use 20s, 500ms or 2m")
    return float(found[1]) * _UNITS[found[2]]


def _parse_curve(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise PlanError("--daily-curve takes numbers between commas") from error


def _parse_given(given: list[str]) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for text in given:
        key, _, value = text.partition("=")
        try:
            values[key] = float(value)
        except ValueError as error:
            raise PlanError(f"--set {text!r} is not NAME=NUMBER") from error
    return values


def _load_curve(file: Path) -> MeasuredCurve:
    try:
        told = json.loads(file.read_text())
        return MeasuredCurve(ServiceCurve(**told["curve"]), f"{told['source']} ({file})")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{file}: is no curve of `python -m benchmarks.planning calibrate`: {error!r}") from error


def _vary(question: PlanQuestion, figures: Figures, sheet: PlanSheet, say: Callable[[str], None]) -> list[_Variation]:
    """Return the plan under other assumptions, with one figure changed at a time."""
    rows = []
    for key, factor in _VARIATIONS:
        if key not in sheet.used:  # a measured curve does not need it
            continue
        value = figures.value(key) * factor
        say(f"planning with {key} = {value:g}")
        try:
            other = build_plan(question, figures.with_values({key: value}))
            rows.append(_Variation(key, value, other["gpus"], other["dollars"]))
        except PlanError as error:
            rows.append(_Variation(key, value, None, None, str(error)))
    return rows


@dataclasses.dataclass(frozen=True, slots=True)
class _Variation:
    key: str
    value: float
    gpus: float | None
    dollars: float | None
    reason: str = ""


def _to_json(question: PlanQuestion, sheet: PlanSheet, rows: list[_Variation]) -> dict[str, Any]:
    asked = {"pages_per_day": question.pages_per_day, "mode": question.mode, "slo_p95_s": question.slo_p95_s}
    return {
        "question": asked,
        "results": [
            {**dataclasses.asdict(line), "is_extrapolated": line.is_extrapolated} for line in sheet.lines.values()
        ],
        "figures": [figure.model_dump(mode="json") for figure in sheet.used.values()],
        "variations": [dataclasses.asdict(row) for row in rows],
    }


def _print(question: PlanQuestion, sheet: PlanSheet, rows: list[_Variation]) -> None:
    console = Console()
    results = Table(
        title=f"{question.pages_per_day:,.0f} pages a day in {question.mode} mode, p95 within {question.slo_p95_s:g} s",
        caption="~ rests on a number that was measured neither here nor by you",
    )
    for column, justify in (("", "left"), ("value", "right"), ("unit", "left"), ("how", "left"), ("rests on", "left")):
        results.add_column(column, justify=justify)  # type: ignore[arg-type]
    for line in sheet.lines.values():
        mark = "~ " if line.is_extrapolated else ""
        results.add_row(line.what, mark + _number(line.value), line.unit, line.how, ", ".join(line.rests_on))
    console.print(results)
    known = Table(title="What it rests on")
    for column, justify in (("name", "left"), ("value", "right"), ("unit", "left"), ("is", "left"), ("source", "left")):
        known.add_column(column, justify=justify)  # type: ignore[arg-type]
    for figure in sorted(sheet.used.values(), key=lambda figure: tuple(Basis).index(figure.basis)):
        known.add_row(figure.key, _number(figure.value), figure.unit, figure.basis, figure.source)
    console.print(known)
    if rows:
        varied = Table(title="How far it hangs on what is assumed", caption="one figure changed at a time")
        for column in ("if", "were", "GPUs", "$/day"):
            varied.add_column(column, justify="left" if column == "if" else "right")
        varied.add_row("as above", "", _number(sheet["gpus"]), _number(sheet["dollars"]))
        for row in rows:
            numbers = ("-", "-") if row.gpus is None or row.dollars is None else map(_number, (row.gpus, row.dollars))
            varied.add_row(row.key, _number(row.value), *numbers)
        console.print(varied)
        for reason in {row.reason for row in rows if row.reason}:
            console.print(f"-: {reason}", markup=False)


def _number(value: float) -> str:
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
