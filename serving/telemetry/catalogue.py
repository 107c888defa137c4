"""The catalogue: every metric that the stack itself exports, in one place.

`python -m serving.telemetry.catalogue` prints it as the tables in the README.

Names follow Prometheus' conventions: base units, `_total` for counters. Label values are bounded: models, tenants,
modes and reasons come from the settings or the code; request ids and client addresses are never labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_FIRST_TOKEN_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_BETWEEN_TOKENS_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512)
_WHOLE_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_QUEUE_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

REQUESTS = Metric(
    "serving_requests_total",
    MetricKind.COUNTER,
    "Requests that ended, by outcome and HTTP status",
    ("route", "tenant", "model", "outcome", "status"),
)
TOKENS = Metric(
    "serving_tokens_total",
    MetricKind.COUNTER,
    "Tokens by kind: prompt (image and cached ones included), image, cached, completion, wasted",
    ("tenant", "model", "kind"),
)
PAGES = Metric(
    "serving_pages_total", MetricKind.COUNTER, "Pages (images) of completed requests", ("tenant", "model", "mode")
)
COST = Metric(
    "serving_cost_dollars_total", MetricKind.COUNTER, "What tenants were charged, US dollars", ("tenant", "model")
)
FIRST_TOKEN = Metric(
    "serving_time_to_first_token_seconds",
    MetricKind.HISTOGRAM,
    "From a request's arrival to the first byte of its streamed answer",
    ("model",),
    _FIRST_TOKEN_S,
)
BETWEEN_TOKENS = Metric(
    "serving_inter_token_latency_seconds",
    MetricKind.HISTOGRAM,
    "Mean time between the tokens of one streamed answer",
    ("model",),
    _BETWEEN_TOKENS_S,
)
WHOLE_REQUEST = Metric(
    "serving_request_duration_seconds",
    MetricKind.HISTOGRAM,
    "From a completed request's arrival to its last byte",
    ("model", "priority"),
    _WHOLE_REQUEST_S,
)
QUEUE_WAIT = Metric(
    "serving_queue_wait_seconds", MetricKind.HISTOGRAM, "Wait for a replica with room", ("model", "priority"), _QUEUE_S
)
QUEUE_REQUESTS = Metric("serving_queue_requests", MetricKind.GAUGE, "Requests that wait", ("model", "priority"))
QUEUE_WORK = Metric("serving_queue_work_tokens", MetricKind.GAUGE, "Work that waits, in tokens", ("model",))
REPLICAS = Metric("serving_replicas", MetricKind.GAUGE, "Engine replicas in the directory", ("model", "state"))
REPLICA_WORK = Metric(
    "serving_replica_work_tokens",
    MetricKind.GAUGE,
    "Work that this router has under way, in tokens",
    ("model", "replica"),
)
BREAKERS = Metric(
    "serving_breaker_state", MetricKind.GAUGE, "Circuit breakers: 0 closed, 1 half open, 2 open", ("model", "replica")
)
RETRIES = Metric("serving_retries_total", MetricKind.COUNTER, "Tries on another replica after the first", ("model",))
REFUSALS = Metric("serving_refusals_total", MetricKind.COUNTER, "Requests refused, by error code", ("tenant", "reason"))
REPLICAS_WANTED = Metric(
    "serving_replicas_wanted", MetricKind.GAUGE, "Engine replicas that the settings ask for, at least", ("model",)
)
REPLICA_HOUR = Metric("serving_replica_hour_dollars", MetricKind.GAUGE, "What a replica costs an hour", ("model",))
SPOOL_RECORDS = Metric("serving_ledger_spool_records", MetricKind.GAUGE, "Records that the database does not hold yet")
SPOOL_BYTES = Metric("serving_ledger_spool_bytes", MetricKind.GAUGE, "Their size on the router's disk")
SPOOL_USED = Metric(
    "serving_ledger_spool_used_ratio",
    MetricKind.GAUGE,
    "Part of what all journals in the router's folder may take that they do; from 1 on, and while the disk takes no "
    "more, requests are refused",
)
LEDGER_RECORDS = Metric(
    "serving_ledger_records_total",
    MetricKind.COUNTER,
    "Records taken (recorded), in the database (committed, repeated), kept in memory since the disk did not take them "
    "(unspooled), given up (refused, lost)",
    ("result",),
)
LEDGER_FAILURES = Metric("serving_ledger_failures_total", MetricKind.COUNTER, "Times that the ledger's database failed")
LEDGER_LAG = Metric("serving_ledger_lag_seconds", MetricKind.GAUGE, "Age of the oldest record that the database lacks")
BUDGET_USED = Metric(
    "serving_budget_used_ratio", MetricKind.GAUGE, "Part of the month's budget that is spent", ("tenant",)
)
BUILD = Metric("serving_build_info", MetricKind.GAUGE, "Always 1; the versions that run", ("version", "ray"))

ROUTER = (
    REQUESTS,
    TOKENS,
    PAGES,
    COST,
    FIRST_TOKEN,
    BETWEEN_TOKENS,
    WHOLE_REQUEST,
    QUEUE_WAIT,
    QUEUE_REQUESTS,
    QUEUE_WORK,
    REPLICAS,
    REPLICAS_WANTED,
    REPLICA_WORK,
    REPLICA_HOUR,
    BREAKERS,
    RETRIES,
    REFUSALS,
    SPOOL_RECORDS,
    SPOOL_BYTES,
    SPOOL_USED,
    LEDGER_LAG,
    LEDGER_RECORDS,
    LEDGER_FAILURES,
    BUDGET_USED,
    BUILD,
)

_IMAGE_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# The plugin defines these itself, since a bare vLLM server with the plugin exports them too. A test compares both.
ENGINE = (
    Metric("serving_image_queue_pages", MetricKind.GAUGE, "Pages that wait for an image worker"),
    Metric("serving_image_pages_total", MetricKind.COUNTER, "Pages made into pixels for the model", ("mode",)),
    Metric(
        "serving_image_failures_total",
        MetricKind.COUNTER,
        "Pages that were not: `invalid`, `full` (no room in the queue), `unavailable` (no worker), `lost` with theirs",
        ("reason",),
    ),
    Metric("serving_image_queue_seconds", MetricKind.HISTOGRAM, "Wait for an image worker", buckets=_IMAGE_S),
    Metric("serving_image_work_seconds", MetricKind.HISTOGRAM, "From a page's start to its pixels", buckets=_IMAGE_S),
    Metric("serving_image_worker_restarts_total", MetricKind.COUNTER, "Image workers replaced after they died or hung"),
    Metric("serving_repetition_stops_total", MetricKind.COUNTER, "Answers that the loop stop cut"),
    Metric("serving_wasted_tokens_total", MetricKind.COUNTER, "Tokens generated for nothing", ("reason",)),
)

_RENDER_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0)

OCR_PAGES = Metric(
    "serving_ocr_pages_total",
    MetricKind.COUNTER,
    "Pages of documents that are done with: completed, failed; by the resolution mode of their last try",
    ("status", "mode"),
)
OCR_PAGE_RETRIES = Metric("serving_ocr_page_retries_total", MetricKind.COUNTER, "Tries to read a page after its first")
OCR_WARNINGS = Metric(
    "serving_ocr_page_warnings_total",
    MetricKind.COUNTER,
    "Pages that were read with a warning, by its code: their text may be incomplete",
    ("kind",),
)
OCR_DOCUMENTS = Metric(
    "serving_ocr_documents_total",
    MetricKind.COUNTER,
    "Documents taken in, by how they came: request, stream, job",
    ("format", "way"),
)
OCR_REFUSALS = Metric("serving_ocr_refusals_total", MetricKind.COUNTER, "Requests refused, by error code", ("reason",))
OCR_OPEN = Metric("serving_ocr_open_documents", MetricKind.GAUGE, "Documents that clients wait for")
OCR_RENDER = Metric(
    "serving_ocr_render_seconds",
    MetricKind.HISTOGRAM,
    "From a page's turn to its picture, the wait for a worker included",
    (),
    _RENDER_S,
)
OCR_RENDER_QUEUE = Metric(
    "serving_ocr_render_queue_requests",
    MetricKind.GAUGE,
    "Documents to be opened and pages to be drawn that wait for their turn",
)
OCR_RENDER_CPU = Metric(
    "serving_ocr_render_cpu_seconds_total",
    MetricKind.COUNTER,
    "CPU time that opening documents and drawing pages has taken",
)
OCR_PAGE = Metric(
    "serving_ocr_page_seconds",
    MetricKind.HISTOGRAM,
    "From a page's turn to its end, all tries and waits included",
    (),
    _WHOLE_REQUEST_S,
)
OCR_STORAGE = Metric(
    "serving_ocr_storage_bytes",
    MetricKind.GAUGE,
    "Documents in the service's folder and results of jobs in the database; services that share them tell the same",
    ("kind",),
)
OCR_STORAGE_USED = Metric(
    "serving_ocr_storage_used_ratio",
    MetricKind.GAUGE,
    "The same as a part of what they may take; at 1 new ones are refused",
    ("kind",),
)
OCR_JOBS = Metric(
    "serving_ocr_jobs", MetricKind.GAUGE, "Jobs in the database; every service tells the same", ("status",)
)
OCR_JOB_LAG = Metric("serving_ocr_job_lag_seconds", MetricKind.GAUGE, "How long the oldest queued job has waited")

OCR = (
    OCR_PAGES,
    OCR_PAGE_RETRIES,
    OCR_WARNINGS,
    OCR_DOCUMENTS,
    OCR_REFUSALS,
    OCR_OPEN,
    OCR_RENDER,
    OCR_RENDER_QUEUE,
    OCR_RENDER_CPU,
    OCR_PAGE,
    OCR_STORAGE,
    OCR_STORAGE_USED,
    OCR_JOBS,
    OCR_JOB_LAG,
    BUILD,
)


def render_table(metrics: tuple[Metric, ...] = ROUTER) -> str:
    """Return a part of the catalogue as a Markdown table."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.help} |" for metric in metrics
    ]
    return "\n".join(["| metric | kind | labels | |", "| --- | --- | --- | --- |", *rows])


def render_tables() -> str:
    """Return the whole catalogue as in the README."""
    parts = (("Routers", ROUTER), ("Engine replicas", ENGINE), ("OCR services", OCR))
    return "\n\n".join(f"{who} export:\n\n{render_table(metrics)}" for who, metrics in parts)


if __name__ == "__main__":
    print(render_tables())
