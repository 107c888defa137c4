"""The options of the command `serving plan`. `plan_report` implements it and needs the extra `plan`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

_PagesPerDay = Annotated[float, typer.Option(help="Pages that come in a day; 33e6 is understood.")]
_Mode = Annotated[str, typer.Option(help="Resolution mode: tiny, small, base, large or gundam.")]
_SloP95 = Annotated[str, typer.Option(help="Longest time of a page at the 95th percentile: 20s, 500ms, 2m.")]
_DailyCurve = Annotated[
    str | None, typer.Option(help="Load of equal parts of your day between commas, in any unit, e.g. 24 hours.")
]
_Given = Annotated[
    list[str] | None,
    typer.Option("--set", help="A figure of your own, as NAME=VALUE; may be given again. Names are in the table."),
]
_GpuHourDollars = Annotated[float | None, typer.Option(help="--set gpu_hour_dollars=...")]
_OutputTokens = Annotated[float | None, typer.Option(help="--set output_tokens=...")]
_PeakToMean = Annotated[float | None, typer.Option(help="--set peak_to_mean=...")]
_Curve = Annotated[
    Path | None,
    typer.Option(help="Engines measured by `python -m benchmarks.planning calibrate`, not the published rate."),
]
_FiguresFile = Annotated[Path | None, typer.Option("--figures", help="A file of figures in the place of ours.")]
_Varies = Annotated[bool, typer.Option(help="Show how far the answer hangs on what is assumed.")]
_IsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plan(
    pages_per_day: _PagesPerDay,
    mode: _Mode = "base",
    slo_p95: _SloP95 = "20s",
    daily_curve: _DailyCurve = None,
    given: _Given = None,
    gpu_hour_dollars: _GpuHourDollars = None,
    output_tokens: _OutputTokens = None,
    peak_to_mean: _PeakToMean = None,
    curve: _Curve = None,
    figures_file: _FiguresFile = None,
    varies: _Varies = True,
    is_json: _IsJson = False,
) -> None:
    """Compute replicas, GPUs, CPU, network, ledger and dollars for a load of pages.

    Each number is printed with its formula and the figures that it depends on; the second table gives the source of
    every figure. A number is marked with ~ if it rests on something that neither this project nor you have measured.

    The rate of a replica comes from a simulation of its engine behind the router. Since this project has measured no
    GPU, the engine is the published one (A100-40G). Measure yours and pass it with --curve, or set figures with --set.
    """
    if importlib.util.find_spec("simpy") is None:
        typer.echo(
            "serving plan simulates engines with SimPy, which is not installed: pip install 'serving[plan]'.", err=True
        )
        raise typer.Exit(2)
    from serving.cli.plan_report import report_plan

    named = {"gpu_hour_dollars": gpu_hour_dollars, "output_tokens": output_tokens, "peak_to_mean": peak_to_mean}
    report_plan(
        pages_per_day=pages_per_day,
        mode=mode,
        slo_p95=slo_p95,
        daily_curve=daily_curve,
        given=given or [],
        named=named,
        curve=curve,
        figures_file=figures_file,
        varies=varies,
        is_json=is_json,
    )
