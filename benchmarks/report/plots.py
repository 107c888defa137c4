"""The report's plots, each drawn from results alone; one whose figures were not measured is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.documents import Document
from benchmarks.report.figures import Figures

OURS, PEERS = "#0b6e99", ("#b0570f", "#5b7f2b", "#7a4f9a", "#888888", "#b03060")
_SIZE = (7.2, 3.4)
# The same picture gives the same file: no date in it, and names of its parts that do not change.
_STYLE = {"svg.hashsalt": "serving", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def _figure(*, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Ours first, then a colour for each peer."""
    return dict(zip(names, (OURS, *PEERS), strict=False))


def draw_concurrency(figures: Figures) -> Figure | None:
    """Pages per second against requests at a time."""
    curves: dict[str, dict[str, Any]] | None = figures.get("concurrency", "curves")
    if not curves:
        return None
    figure, (left, right) = _figure(columns=2)
    for name, colour in _colours(list(curves)).items():
        levels = [int(level) for level in curves[name]]
        left.plot(levels, [seen["pages_per_s"] for seen in curves[name].values()], "o-", color=colour, label=name)
        right.plot(levels, [seen["first_s"]["p50"] for seen in curves[name].values()], "o-", color=colour, label=name)
    for axes, title in ((left, "pages/s"), (right, "time to first token, p50, s")):
        axes.set(xlabel="requests at a time", title=title, xscale="log", ylim=(0, None))
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
    left.legend(fontsize=7)
    return figure


def draw_latency(figures: Figures) -> Figure | None:
    """Distributions at the highest level: first token, and between tokens."""
    curves: dict[str, dict[str, Any]] | None = figures.get("concurrency", "curves")
    if not curves:
        return None
    figure, panels = _figure(columns=2)
    for name, colour in _colours(list(curves)).items():
        level, seen = list(curves[name].items())[-1]
        for axes, key in zip(panels, ("first_s", "gap_s"), strict=True):
            times = seen[key]["curve"]
            axes.plot([1e3 * time for time in times], [index / (len(times) - 1) for index in range(len(times))],
                      color=colour, label=name)  # fmt: skip
    for axes, title in zip(panels, ("time to first token", "between tokens"), strict=True):
        axes.set(title=f"{title}, {level} at a time", xlabel="ms", ylabel="part of all", xscale="log", ylim=(0, 1))
    panels[1].legend(fontsize=7)
    return figure


def draw_scaling(figures: Figures) -> Figure | None:
    """Requests per second against replicas, beside the straight line."""
    levels: dict[str, dict[str, float]] | None = figures.get("scaling", "levels")
    if not levels:
        return None
    figure, (axes,) = _figure()
    replicas = [int(level) for level in levels]
    axes.plot(replicas, [seen["ideal_per_s"] for seen in levels.values()], "--", color=PEERS[3], label="engines' best")
    measured = [seen["requests_per_s"] for seen in levels.values()]
    axes.plot(replicas, measured, "o-", color=OURS, label="through one router")
    axes.set(xlabel="replicas (scripted engines)", ylabel="requests/s", xlim=(0, None), ylim=(0, None))
    axes.legend()
    return figure


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str) -> None:
    places = range(len(names))
    axes.barh(places, values, color=[OURS, *([PEERS[3]] * (len(names) - 1))])
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(title=title, xlim=(0, 1.18 * max(values)))
    for place, value in zip(places, values, strict=True):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)


def draw_chunk_cpu(figures: Figures) -> Figure | None:
    """What each way adds to a chunk."""
    figure, panels = _figure(columns=2)
    for axes, pace in zip(panels, ("unpaced", "one chunk per 10 ms"), strict=True):
        measure = f"CPU that the router adds per chunk, c=16, {pace}"
        peers = ("plain aiohttp", "plain starlette", "Serve's HAProxy")
        rows = [row for peer in peers if (row := figures.row("router.chunks", measure, peer))]
        if not rows:
            return None
        names = ["router", *(row.peer_name.replace("and httpx", "\n+ httpx") for row in rows)]
        _bars(axes, names, [rows[0].ours, *(row.peer for row in rows)], f"us of CPU added per chunk,\n{pace}")
    return figure


def draw_page_cpu(figures: Figures) -> Figure | None:
    """Page to pixels, and whole requests, in CPU time."""
    whole, cpu = "whole requests", "256 tokens out: CPU"
    wanted = (
        ("fastpath.images", "page", "A4 page\nto pixels, ms"),
        ("fastpath.servers", f"{whole}, nearly free model, {cpu}", "request, nearly\nfree model, s"),
        ("fastpath.servers", f"{whole}, nano sizes, {cpu}", "request,\nnano sizes, s"),
    )
    found = [(title, row) for name, measure, title in wanted if (row := figures.row(name, measure))]
    if not found:
        return None
    figure, panels = _figure(columns=len(found))
    for axes, (title, row) in zip(panels, found, strict=True):
        _bars(axes, ["ours", "stock\nvLLM"], [row.ours, row.peer], title)
    return figure


_PAGES = "pages read, nano checkpoint, c=16"


def draw_overhead(figures: Figures) -> Figure | None:
    """Ours over each peer, throughput: 1 is as fast."""
    wanted = (
        ("router.stack", "output tokens", "bare vLLM", "per second", "tokens/s: bare vLLM with the plugin"),
        ("router.stack", "output tokens", "plain aiohttp", "per second", "tokens/s: plain proxy before the same"),
        ("concurrency", _PAGES, "bare vLLM server with", "", "pages/s: bare vLLM, plugin"),
        ("concurrency", _PAGES, "bare vLLM server, stock", "", "pages/s: bare vLLM, stock"),
        ("router.ray_llm", "chunks per second", "ray.serve.llm, default", "", "chunks/s: ray.serve.llm, default"),
        ("router.ray_llm", "chunks per second", "ray.serve.llm, haproxy", "", "chunks/s: ray.serve.llm, HAProxy"),
        ("router.ray_llm", "chunks per second", "ray.serve.llm, direct", "", "chunks/s: ray.serve.llm, direct"),
    )  # fmt: skip
    found = [
        (title, row.ratio)
        for name, measure, peer, unit, title in wanted
        if (row := figures.row(name, measure, peer, unit)) and row.ratio
    ]
    if not found:
        return None
    figure, (axes,) = _figure()
    titles, ratios = zip(*found, strict=True)
    _bars(axes, titles, ratios, "this stack's throughput over its peer's")
    axes.axvline(1, color="black", linewidth=0.8)
    return figure


def draw_soak(figures: Figures) -> Figure | None:
    """Memory and descriptors of every process over the soak's time."""
    series = figures.get("soak", "series")
    return draw_series(series) if series else None


def draw_series(series: Sequence[Mapping[str, Any]]) -> Figure:
    """Of processes: `part`, and over `at_s` their `mib` and `files`. One colour for each part."""
    figure, panels = _figure(columns=2)
    colours = _colours(list(dict.fromkeys(str(each["part"]) for each in series)))
    named: set[str] = set()
    for each in series:
        part = str(each["part"])
        for axes, key in zip(panels, ("mib", "files"), strict=True):
            label = part if part not in named else None
            axes.plot([at / 60 for at in each["at_s"]], each[key], color=colours[part], linewidth=0.9, label=label)
        named.add(part)
    for axes, title in zip(panels, ("memory, MiB", "open descriptors"), strict=True):
        axes.set(title=title, xlabel="minutes", ylim=(0, None))
    panels[0].legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable[[Figures], Figure | None]] = {
    "concurrency": draw_concurrency,
    "latency": draw_latency,
    "scaling": draw_scaling,
    "overhead": draw_overhead,
    "chunk_cpu": draw_chunk_cpu,
    "page_cpu": draw_page_cpu,
    "soak": draw_soak,
}


def draw_all(documents: Mapping[str, Document], folder: Path) -> list[str]:
    """Draw what can be drawn and give the names."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = Figures(documents)
    drawn = []
    for name, draw in PLOTS.items():
        with mpl.rc_context(_STYLE):
            figure = draw(figures)
            if figure is not None:
                save(figure, folder / f"{name}.svg")
                drawn.append(name)
    return drawn


def save(figure: Figure, file: Path) -> None:
    """As SVG, the same bytes for the same picture."""
    with mpl.rc_context(_STYLE):
        figure.savefig(file, metadata={"Date": None})
