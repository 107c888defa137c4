"""Computes what a load of pages needs: replicas and GPUs, CPU, network, ledger and dollars. Pure.

Every number is a line of a sheet, with its formula and the figures that it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from serving.billing.prices import Price
from serving.planning.curve import ServiceCurve
from serving.planning.figures import Basis, Figures, PlanFigure
from serving.planning.sheet import PlanSheet
from serving.planning.simulation import Pages
from serving.planning.sizing import CELL, PlanError, Sizing
from serving.plugin.modes.selection import MODES
from serving.settings.billing import RateSettings

DAY_S, DAY_H = 86_400, 24
_A4_AT_200_DPI = (1654, 2339)
_MAX_MODEL_LEN, _LARGEST_PROMPT = 8192, 1200  # configs/h100.yaml; gundam's page and some text
_TEXT_BYTES_PER_TOKEN = 4  # bytes of the answer's text, in addition to those of the events around it
_CURVE_KEYS = (
    "published_tokens_per_s",
    "published_concurrency",
    "alone_tokens_per_s",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_tokens",
)


@dataclass(frozen=True, slots=True)
class MeasuredCurve:
    curve: ServiceCurve
    source: str
    """What was measured, when and where."""


@dataclass(frozen=True, slots=True)
class PlanQuestion:
    """The load and the latency objective."""

    pages_per_day: float
    mode: str
    slo_p95_s: float
    daily_curve: tuple[float, ...] = ()
    """Load in equal parts of a day, in any unit; empty means a sine with the figure `peak_to_mean`."""
    measured: MeasuredCurve | None = None
    """Measured engines, used instead of the published ones."""


def build_plan(question: PlanQuestion, figures: Figures, say: Callable[[str], None] = lambda _: None) -> PlanSheet:
    """Compute the whole plan.

    Raises:
        PlanError: the objective cannot be met, or the question is invalid.
    """
    sheet = PlanSheet(figures)
    loads = _add_load(sheet, question)
    sizing = _add_engines(sheet, question, say)
    hours = _add_replicas(sheet, question, sizing, loads)
    _add_cpu(sheet, question)
    _add_network(sheet, question)
    _add_ledger(sheet)
    _add_money(sheet, hours)
    return sheet


def _add_load(sheet: PlanSheet, question: PlanQuestion) -> Sequence[float]:
    """Add the lines of the daily load, and return the load of each part of the day relative to the mean."""
    if question.pages_per_day <= 0 or question.slo_p95_s <= 0:
        raise PlanError("pages per day and the promised time must be above zero")
    if question.mode not in MODES:
        raise PlanError(f"there is no mode {question.mode}; there are {', '.join(MODES)}")
    mean = sheet.add(
        "mean_rate",
        "load, mean",
        question.pages_per_day / DAY_S,
        "pages/s",
        f"{question.pages_per_day:,.0f} / 86,400 s",
    )
    if question.daily_curve:
        loads = normalise(question.daily_curve)
        sheet.add("peak_rate", "load, peak", mean * max(loads), "pages/s", "mean x the largest part of your day")
    else:
        ratio = sheet["peak_to_mean"]
        loads = sine_day(ratio)
        how = f"mean x {ratio:g}; the day is a sine"
        sheet.add("peak_rate", "load, peak", mean * ratio, "pages/s", how, "mean_rate", "peak_to_mean")
    image_tokens = MODES[question.mode].num_tokens(*_A4_AT_200_DPI)
    prompt = image_tokens + sheet["prompt_text_tokens"]
    how = f"{image_tokens} of an A4 page in {question.mode} mode (serving/plugin/modes/resolution.py), the rest is text"
    sheet.add("prompt_tokens", "prompt", prompt, "tokens/page", how, "prompt_text_tokens")
    tokens = sheet["peak_rate"] * sheet["output_tokens"]
    how = f"peak load x {sheet['output_tokens']:,.0f} tokens/page"
    sheet.add("token_rate", "output, peak", tokens, "tokens/s", how, "peak_rate", "output_tokens")
    return loads


def normalise(loads: Sequence[float]) -> tuple[float, ...]:
    """Return the loads relative to their mean.

    Raises:
        PlanError: there are no loads, one is negative, or all are zero.
    """
    if not loads or min(loads) < 0 or not sum(loads) or not math.isfinite(sum(loads)):
        raise PlanError("a daily curve needs loads that are not negative and not all zero")
    mean = sum(loads) / len(loads)
    return tuple(load / mean for load in loads)


def sine_day(peak_to_mean: float) -> tuple[float, ...]:
    """Return a sine over 24 hours with a mean of 1 and this peak.

    Raises:
        PlanError: no sine has this peak.
    """
    if not 1 <= peak_to_mean <= 2:
        raise PlanError("a peak is 1 to 2 times the mean of a day that is a sine; for other days give --daily-curve")
    return tuple(1 + (peak_to_mean - 1) * math.cos(2 * math.pi * hour / DAY_H) for hour in range(DAY_H))


def build_curve(sheet: PlanSheet, overhead_s: float) -> ServiceCurve:
    """Return the curve through two points: the published rate with many sequences, and the rate of a single sequence.

    Raises:
        PlanError: a single sequence is not faster than one of many.
    """
    rate, places, alone = (sheet[key] for key in _CURVE_KEYS[:3])
    if alone <= rate / places:
        raise PlanError(
            f"a sequence that is alone must be faster than {rate / places:g} tokens/s, as it is among others"
        )
    per_seq_s = (places / rate - 1 / alone) / (places - 1)
    return ServiceCurve(
        base_s=1 / alone - per_seq_s,
        per_seq_s=per_seq_s,
        prefill_s=0.0,  # already included in the published rate
        overhead_s=overhead_s,
        max_seqs=int(sheet["max_num_seqs"]),
        kv_tokens=int(sheet["kv_tokens"]),
        prompts_per_step=max(1, int(sheet["max_num_batched_tokens"] / sheet["prompt_tokens"])),
    )


def _add_engines(sheet: PlanSheet, question: PlanQuestion, say: Callable[[str], None]) -> Sizing:
    page_ms, router_ms = f"page_cpu_ms_{question.mode}", "router_page_cpu_ms"
    overhead_s = (sheet[page_ms] + sheet[router_ms]) / 1e3
    rests: tuple[str, ...] = ("curve",)
    if question.measured is not None:
        curve = question.measured.curve
        sheet.use(PlanFigure(key="curve", value=1.0, unit="", basis=Basis.MEASURED, source=question.measured.source))
    else:
        curve, rests = build_curve(sheet, overhead_s), (*_CURVE_KEYS, page_ms, router_ms)
    how = (
        f"a step takes {curve.base_s * 1e3:.2f} ms + {curve.per_seq_s * 1e3:.3f} ms per sequence, a prompt "
        f"{curve.prefill_s * 1e3:.1f} ms, a request {curve.overhead_s * 1e3:.0f} ms outside of the engine"
    )
    pages = Pages(
        round(sheet["prompt_tokens"]), sheet["output_tokens"], sheet["output_spread"], _MAX_MODEL_LEN - _LARGEST_PROMPT
    )
    sizing = Sizing(curve, pages, question.slo_p95_s, sheet["max_utilisation"], say)
    sheet.add("replica_peak", "replica that is always full", sizing.peak_rate, "pages/s", how, *rests, "output_tokens")
    rate = sizing.rate_per_replica(CELL)
    how = (
        f"simulated: the highest rate with a p95 of at most {question.slo_p95_s:g} s, and at most "
        f"{sheet['max_utilisation']:.0%} of a replica that is always full"
    )
    rests = ("replica_peak", "output_spread", "max_utilisation")
    sheet.add("replica_rate", "replica within the promise", rate, "pages/s", how, *rests)
    return sizing


@dataclass(frozen=True, slots=True)
class _Hours:
    """The replicas over a day."""

    num_replicas: tuple[int, ...]
    """Replicas that each part of the day needs, without spare ones."""

    @property
    def mean(self) -> float:
        return sum(self.num_replicas) / len(self.num_replicas)


def _add_replicas(sheet: PlanSheet, question: PlanQuestion, sizing: Sizing, loads: Sequence[float]) -> _Hours:
    peak = sheet["peak_rate"]
    needed = sizing.num_replicas(peak)
    sheet.add("replicas", "replicas at peak", needed, "", "peak load / a replica's rate", "peak_rate", "replica_rate")
    outcome = sizing.look(needed, peak)
    for key, what, value in (
        ("p50", "time of a page at peak, p50", outcome.p50_s),
        ("p95", "time of a page at peak, p95", outcome.p95_s),
        ("first_p95", "time to the first token at peak, p95", outcome.first_p95_s),
    ):
        sheet.add(key, what, value, "s", "simulated with Poisson arrivals and the router's own choice", "replicas")
    per_node, spare = sheet["gpus_per_node"], sheet["spare_nodes"]
    nodes = math.ceil(needed / per_node) + spare
    how = f"{needed} replicas, a GPU each, {per_node:g} a node, and {spare:g} spare"
    sheet.add("nodes", "nodes", nodes, "", how, "replicas", "gpus_per_node", "spare_nodes")
    sheet.add("gpus", "GPUs", nodes * per_node, "", f"nodes x {per_node:g}", "nodes", "gpus_per_node")
    floor = question.pages_per_day / sheet["published_pages_per_gpu_day"]
    how = "pages per day / published pages per GPU and day: a flat day, no promise, nothing spare; for comparison"
    sheet.add(
        "gpus_floor", "GPUs by the published rate alone", math.ceil(floor), "", how, "published_pages_per_gpu_day"
    )
    mean = sheet["mean_rate"]
    return _Hours(tuple(sizing.num_replicas(mean * load) if load else 0 for load in loads))


def _add_cpu(sheet: PlanSheet, question: PlanQuestion) -> None:
    peak, most = sheet["peak_rate"], sheet["cpu_utilisation"]
    page = f"page_cpu_ms_{question.mode}"
    cores = peak * sheet[page] / 1e3 / most
    how = f"peak load x {sheet[page]:.1f} ms / {most:.0%}"
    sheet.add(
        "cores_images", "cores for image preprocessing", cores, "cores", how, "peak_rate", page, "cpu_utilisation"
    )
    processes = sheet["replicas"] * sheet["cores_per_engine"]
    how = f"replicas x {sheet['cores_per_engine']:g}: API process and engine core"
    sheet.add("cores_engines", "cores for engine processes", processes, "cores", how, "replicas", "cores_per_engine")
    per_gpu = (cores + processes) / sheet["replicas"]
    how = "both, per replica at peak"
    sheet.add("cores_per_gpu", "cores beside each GPU", per_gpu, "cores", how, "cores_images", "cores_engines")
    chunks_ms = sheet["output_tokens"] * sheet["streamed_share"] * sheet["router_chunk_cpu_us"] / 1e3
    per_page_ms = sheet["router_page_cpu_ms"] + chunks_ms + sheet["ledger_cpu_us"] / 1e3
    router = peak * per_page_ms / 1e3 / most
    how = (
        f"peak load x ({sheet['router_page_cpu_ms']:.1f} ms a request + {chunks_ms:.1f} ms for its streamed tokens + "
        f"{sheet['ledger_cpu_us']:.0f} us for the ledger) / {most:.0%}; a router process uses one"
    )
    rests = (
        "peak_rate",
        "router_page_cpu_ms",
        "router_chunk_cpu_us",
        "output_tokens",
        "streamed_share",
        "ledger_cpu_us",
    )
    sheet.add("cores_routers", "cores for routers", router, "cores", how, *rests, "cpu_utilisation")
    spare = sheet["spare_routers"]
    how = f"one per core, and {spare:g} spare"
    sheet.add("routers", "router processes", math.ceil(router) + spare, "", how, "cores_routers", "spare_routers")


def _add_network(sheet: PlanSheet, question: PlanQuestion) -> None:
    peak, size = sheet["peak_rate"], sheet["request_bytes"]
    how = f"peak load x {size / 1e6:.2f} MB (a JPEG in base64); the same again from routers to engines"
    sheet.add("net_in", "network into the routers", peak * size * 8 / 1e9, "Gbit/s", how, "peak_rate", "request_bytes")
    answer = sheet["output_tokens"] * (sheet["streamed_share"] * sheet["event_bytes"] + _TEXT_BYTES_PER_TOKEN)
    how = f"peak load x {answer / 1e3:.0f} kB, {sheet['event_bytes']:.0f} bytes an event; the same from the engines"
    rests = ("peak_rate", "output_tokens", "event_bytes", "streamed_share")
    sheet.add("net_out", "network out of the routers", peak * answer * 8 / 1e9, "Gbit/s", how, *rests)
    pixels = f"pixel_bytes_{question.mode}"
    how = f"peak load / nodes x {sheet[pixels] / 1e6:.1f} MB, from image workers to engines"
    memory = peak / (sheet["nodes"] - sheet["spare_nodes"]) * sheet[pixels] / 1e9
    sheet.add("pixels", "memory traffic of pixels, per node", memory, "GB/s", how, "peak_rate", "nodes", pixels)


def _add_ledger(sheet: PlanSheet) -> None:
    rows = sheet["mean_rate"] * DAY_S / sheet["pages_per_request"]
    how = f"a row per request, {sheet['pages_per_request']:g} pages each"
    sheet.add("rows", "ledger", rows, "rows/day", how, "pages_per_request")
    at_peak = sheet["peak_rate"] / sheet["pages_per_request"]
    sheet.add("rows_rate", "ledger at peak", at_peak, "rows/s", "the same at peak", "peak_rate", "pages_per_request")
    size = sheet["ledger_row_bytes"]
    how = f"rows x {size:.0f} bytes in PostgreSQL, indices included"
    sheet.add("ledger_bytes", "ledger's database", rows * size / 1e9, "GB/day", how, "rows", "ledger_row_bytes")
    size = sheet["journal_row_bytes"]
    how = f"rows x {size:.0f} bytes; deleted once they are in the database"
    sheet.add("journal_bytes", "routers' journals", rows * size / 1e9, "GB/day", how, "rows", "journal_row_bytes")


def _add_money(sheet: PlanSheet, hours: _Hours) -> None:
    hour, core = sheet["gpu_hour_dollars"], sheet["core_hour_dollars"]
    fixed = sheet["gpus"] * DAY_H * hour
    how = f"GPUs x 24 h x ${hour:g}, with their nodes"
    sheet.add("gpu_dollars", "GPUs, all day", fixed, "$/day", how, "gpus", "gpu_hour_dollars")
    routers = sheet["routers"] * DAY_H * core
    how = f"router processes x 24 h x ${core:g} a core"
    sheet.add("router_dollars", "routers", routers, "$/day", how, "routers", "core_hour_dollars")
    total = sheet.add("dollars", "all", fixed + routers, "$/day", "both", "gpu_dollars", "router_dollars")
    spare = sheet["spare_nodes"] * sheet["gpus_per_node"]
    scaled = (hours.mean + spare) * DAY_H * hour + routers
    how = f"replicas follow the load: {hours.mean:.0f} on average, and the spare node; starting takes no time"
    sheet.add("dollars_scaled", "all, with autoscaling", scaled, "$/day", how, "dollars", "replica_rate")
    pages = sheet["mean_rate"] * DAY_S
    sheet.add("dollars_per_1000", "per 1,000 pages", total / pages * 1000, "$", "all / pages", "dollars")
    rates = RateSettings(
        input_per_million=Decimal(str(sheet["input_dollars"])), output_per_million=Decimal(str(sheet["output_dollars"]))
    )
    cost = Price.from_settings(rates).cost_nanodollars(
        num_prompt_tokens=round(sheet["prompt_tokens"]), num_completion_tokens=round(sheet["output_tokens"])
    )
    how = f"${sheet['input_dollars']:g} per million tokens in, ${sheet['output_dollars']:g} out"
    rests = ("prompt_tokens", "output_tokens", "input_dollars", "output_dollars")
    earned = sheet.add("revenue", "revenue at the price list", pages * cost / 1e9, "$/day", how, *rests)
    sheet.add("margin", "margin", earned - total, "$/day", "revenue - all", "revenue", "dollars")
