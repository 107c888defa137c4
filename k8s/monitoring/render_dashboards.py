"""Grafana's dashboards, made from what is written here.

    python k8s/monitoring/render_dashboards.py

writes the folder `dashboards`.

A panel is a title, a unit, and expressions with their legends. Counters that count what should not happen are filled up
with zeros, so that an empty panel always means that something is not scraped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "dashboards"
RATE = "$__rate_interval"
"""Grafana puts a duration in its place that fits the scrapes and the width of the picture."""
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 8


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of it."""
    queries: tuple[tuple[str, str], ...]
    """Expression and legend."""


def _quantiles(metric: str, by: str = "model") -> tuple[tuple[str, str], ...]:
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({by}, le) (rate({metric}_bucket[{RATE}])))",
            f"p{round(q * 100)} {{{{{by}}}}}",
        )
        for q in (0.5, 0.95, 0.99)
    )


def _rate(metric: str, by: str, selector: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{selector}[{RATE}]))"


def _or_zero(expression: str) -> str:
    return f"{expression} or vector(0)"


SERVING = (
    Panel("Requests", "reqps", ((_rate("serving_requests_total", "outcome"), "{{outcome}}"),)),
    Panel(
        "Error budget burn (1 spends it in 30 days)",
        "short",
        tuple((f"serving_errors:burn{window}", window) for window in ("5m", "1h", "6h")),
    ),
    Panel("Tokens", "short", (("model_kind:serving_tokens:rate5m", "{{model}} {{kind}}"),)),
    Panel("Pages", "short", (("model:serving_pages:rate5m", "{{model}}"),)),
    Panel("Time to the first token", "s", _quantiles("serving_time_to_first_token_seconds")),
    Panel("Time between tokens", "s", _quantiles("serving_inter_token_latency_seconds")),
    Panel("Whole request", "s", _quantiles("serving_request_duration_seconds")),
    Panel("Wait for a replica", "s", _quantiles("serving_queue_wait_seconds", "priority")),
    Panel(
        "Waiting requests", "short", (("sum by (model, priority) (serving_queue_requests)", "{{model}} {{priority}}"),)
    ),
    Panel("Waiting work, tokens", "short", (("sum by (model) (serving_queue_work_tokens)", "{{model}}"),)),
    Panel("Refusals", "reqps", ((_or_zero(_rate("serving_refusals_total", "reason")), "{{reason}}"),)),
    Panel("Retries", "reqps", ((_or_zero(_rate("serving_retries_total", "model")), "{{model}}"),)),
    Panel(
        "Replicas",
        "short",
        (
            ("max by (model, state) (serving_replicas)", "{{model}} {{state}}"),
            ("max by (model) (serving_replicas_wanted)", "{{model}} wanted"),
        ),
    ),
    Panel("Breakers (2 is open)", "short", (("max by (replica) (serving_breaker_state)", "{{replica}}"),)),
    Panel("Versions", "short", (("count by (version, ray) (serving_build_info)", "{{version}}, Ray {{ray}}"),)),
)

COST = (
    Panel(
        "Dollars per hour",
        "currencyUSD",
        (
            ("model:serving_charged_dollars_per_hour:rate5m", "{{model}} charged"),
            ("model:serving_spend_dollars_per_hour", "{{model}} spent"),
        ),
    ),
    Panel(
        "Dollars per 1,000 pages",
        "currencyUSD",
        (
            ("model:serving_charged_dollars_per_1000_pages:rate1h", "{{model}} charged"),
            ("model:serving_spend_dollars_per_1000_pages:rate1h", "{{model}} spent"),
        ),
    ),
    Panel(
        "Charged to tenants, dollars per hour",
        "currencyUSD",
        (("tenant:serving_charged_dollars_per_hour:rate1h", "{{tenant}}"),),
    ),
    Panel("Budgets", "percentunit", ((_or_zero("max by (tenant) (serving_budget_used_ratio)"), "{{tenant}}"),)),
    Panel("Tokens of tenants", "short", ((_rate("serving_tokens_total", "tenant, kind"), "{{tenant}} {{kind}}"),)),
    Panel("Pages of tenants", "short", ((_rate("serving_pages_total", "tenant, mode"), "{{tenant}} {{mode}}"),)),
    Panel(
        "Tokens for nothing",
        "short",
        ((_or_zero(_rate("serving_tokens_total", "model", '{kind="wasted"}')), "{{model}}"),),
    ),
    Panel("Ledger: records that wait", "short", (("sum by (router) (serving_ledger_spool_records)", "{{router}}"),)),
    Panel("Ledger: size of the spool", "bytes", (("sum by (router) (serving_ledger_spool_bytes)", "{{router}}"),)),
    Panel("Ledger: lag", "s", (("max by (router) (serving_ledger_lag_seconds)", "{{router}}"),)),
    Panel("Ledger: records", "short", ((_rate("serving_ledger_records_total", "result"), "{{result}}"),)),
    Panel(
        "Ledger: failures of the database", "short", ((_rate("serving_ledger_failures_total", "router"), "{{router}}"),)
    ),
)

ENGINES = (
    Panel("Running requests", "short", (("sum by (replica) (vllm:num_requests_running)", "{{replica}}"),)),
    Panel("Requests that wait inside", "short", (("sum by (replica) (vllm:num_requests_waiting)", "{{replica}}"),)),
    Panel("KV cache", "percentunit", (("max by (replica) (vllm:kv_cache_usage_perc)", "{{replica}}"),)),
    Panel(
        "Tokens",
        "short",
        (
            (_rate("vllm:prompt_tokens_total", "replica"), "{{replica}} prompt"),
            (_rate("vllm:generation_tokens_total", "replica"), "{{replica}} generated"),
        ),
    ),
    Panel(
        "Ended requests", "reqps", ((_rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),)
    ),
    Panel("Work by replica, tokens", "short", (("sum by (replica) (serving_replica_work_tokens)", "{{replica}}"),)),
    Panel("Pages made into pixels", "short", ((_rate("serving_image_pages_total", "mode"), "{{mode}}"),)),
    Panel("Pages that wait for a worker", "short", (("sum by (replica) (serving_image_queue_pages)", "{{replica}}"),)),
    Panel("Work on a page", "s", _quantiles("serving_image_work_seconds")),
    Panel("Wait for a worker", "s", _quantiles("serving_image_queue_seconds")),
    Panel("Pages that failed", "short", ((_or_zero(_rate("serving_image_failures_total", "reason")), "{{reason}}"),)),
    Panel("Workers replaced", "short", ((_rate("serving_image_worker_restarts_total", "replica"), "{{replica}}"),)),
    Panel(
        "Answers cut since they repeat", "short", ((_rate("serving_repetition_stops_total", "replica"), "{{replica}}"),)
    ),
    Panel("Tokens for nothing", "short", ((_or_zero(_rate("serving_wasted_tokens_total", "reason")), "{{reason}}"),)),
    Panel("Scraped", "short", (("up", "{{job}} {{instance}}"),)),
)

DOCUMENTS = (
    Panel("Pages", "short", ((_or_zero(_rate("serving_ocr_pages_total", "status, mode")), "{{status}} {{mode}}"),)),
    Panel(
        "Failed pages",
        "percentunit",
        (
            (
                _or_zero(
                    f'sum(rate(serving_ocr_pages_total{{status="failed"}}[{RATE}]))'
                    f" / sum(rate(serving_ocr_pages_total[{RATE}]))"
                ),
                "failed",
            ),
        ),
    ),
    Panel("Pages with a warning", "short", ((_or_zero(_rate("serving_ocr_page_warnings_total", "kind")), "{{kind}}"),)),
    Panel("Retries of pages", "short", ((_or_zero(_rate("serving_ocr_page_retries_total", "job")), "retries"),)),
    Panel(
        "Documents", "short", ((_or_zero(_rate("serving_ocr_documents_total", "format, way")), "{{format}} {{way}}"),)
    ),
    Panel("Refusals", "reqps", ((_or_zero(_rate("serving_ocr_refusals_total", "reason")), "{{reason}}"),)),
    Panel("Page, from its turn to its end", "s", _quantiles("serving_ocr_page_seconds", "job")),
    Panel("Drawing a page, the wait included", "s", _quantiles("serving_ocr_render_seconds", "job")),
    Panel("Waiting to be drawn", "short", (("sum by (instance) (serving_ocr_render_queue_requests)", "{{instance}}"),)),
    Panel(
        "CPUs that drawing uses",
        "short",
        ((_rate("serving_ocr_render_cpu_seconds_total", "instance"), "{{instance}}"),),
    ),
    Panel("Open documents", "short", (("sum by (instance) (serving_ocr_open_documents)", "{{instance}}"),)),
    Panel("Jobs", "short", (("max by (status) (serving_ocr_jobs)", "{{status}}"),)),
    Panel("Oldest queued job", "s", (("max(serving_ocr_job_lag_seconds)", "waits"),)),
    Panel("Storage", "bytes", (("max by (kind) (serving_ocr_storage_bytes)", "{{kind}}"),)),
    Panel("Storage, used part", "percentunit", (("max by (kind) (serving_ocr_storage_used_ratio)", "{{kind}}"),)),
)

DASHBOARDS = {"serving": SERVING, "cost": COST, "engines": ENGINES, "documents": DOCUMENTS}


def build_dashboard(name: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """In the shape that Grafana imports; the source of data is chosen in it."""
    return {
        "uid": f"serving-{name}",
        "title": f"Serving: {name}" if name != "serving" else "Serving",
        "tags": ["serving"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_build_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _build_panel(number: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    per_row = _COLUMNS // _WIDTH
    return {
        "id": number + 1,
        "title": panel.title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {"x": number % per_row * _WIDTH, "y": number // per_row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def render_dashboards() -> dict[Path, str]:
    """What belongs into the files."""
    return {
        FOLDER / f"{name}.json": json.dumps(build_dashboard(name, panels), indent=2) + "\n"
        for name, panels in DASHBOARDS.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in render_dashboards().items():
        file.write_text(text)
