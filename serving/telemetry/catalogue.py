"""The catalogue: every metric that the stack itself exports, in one place.

`python -m serving.telemetry.catalogue` prints it as the tables that the README holds.

Names follow Prometheus: base units, `_total` for counters. Labels are bounded: models, tenants, modes and reasons are
known to the settings or the code; request ids and client addresses never become labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_FIRST_TOKEN_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_BETWEEN_TOKENS_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512)
_WHOLE_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_QUEUE_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

REQUESTS = Metric(
    "serving_requests_total",
    Kind.COUNTER,
    "Requests that ended, by outcome and HTTP status",
    ("route", "tenant", "model", "outcome", "status"),
)
TOKENS = Metric(
    "serving_tokens_total",
    Kind.COUNTER,
    "Tokens by kind: prompt (image and cached ones included), image, cached, completion, wasted",
    ("tenant", "model", "kind"),
)
PAGES = Metric("serving_pages_total", Kind.COUNTER, "Pages (images) of completed requests", ("tenant", "model", "mode"))
COST = Metric("serving_cost_dollars_total", Kind.COUNTER, "What tenants were charged, US dollars", ("tenant", "model"))
FIRST_TOKEN = Metric(
    "serving_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "From a request's arrival to the first byte of its streamed answer",
    ("model",),
    _FIRST_TOKEN_S,
)
BETWEEN_TOKENS = Metric(
    "serving_inter_token_latency_seconds",
    Kind.HISTOGRAM,
    "Mean time between the tokens of one streamed answer",
    ("model",),
    _BETWEEN_TOKENS_S,
)
WHOLE_REQUEST = Metric(
    "serving_request_duration_seconds",
    Kind.HISTOGRAM,
    "From a completed request's arrival to its last byte",
    ("model", "priority"),
    _WHOLE_REQUEST_S,
)
QUEUE_WAIT = Metric(
    "serving_queue_wait_seconds", Kind.HISTOGRAM, "Wait for a replica with room", ("model", "priority"), _QUEUE_S
)
QUEUE_REQUESTS = Metric("serving_queue_requests", Kind.GAUGE, "Requests that wait", ("model", "priority"))
QUEUE_WORK = Metric("serving_queue_work_tokens", Kind.GAUGE, "Work that waits, in tokens", ("model",))
REPLICAS = Metric("serving_replicas", Kind.GAUGE, "Engine replicas in the directory", ("model", "state"))
REPLICA_WORK = Metric(
    "serving_replica_work_tokens", Kind.GAUGE, "Work that this router has under way, in tokens", ("model", "replica")
)
BREAKERS = Metric(
    "serving_breaker_state", Kind.GAUGE, "Circuit breakers: 0 closed, 1 half open, 2 open", ("model", "replica")
)
RETRIES = Metric("serving_retries_total", Kind.COUNTER, "Tries on another replica after the first", ("model",))
REFUSALS = Metric("serving_refusals_total", Kind.COUNTER, "Requests refused, by error code", ("tenant", "reason"))
REPLICAS_WANTED = Metric(
    "serving_replicas_wanted", Kind.GAUGE, "Engine replicas that the settings ask for, at least", ("model",)
)
REPLICA_HOUR = Metric("serving_replica_hour_dollars", Kind.GAUGE, "What a replica costs an hour", ("model",))
SPOOL_RECORDS = Metric("serving_ledger_spool_records", Kind.GAUGE, "Records that the database does not hold yet")
SPOOL_BYTES = Metric("serving_ledger_spool_bytes", Kind.GAUGE, "Their size on the router's disk")
SPOOL_USED = Metric(
    "serving_ledger_spool_used_ratio",
    Kind.GAUGE,
    "Part of what all journals in the router's folder may take that they do; from 1 on, and while the disk takes no "
    "more, requests are refused",
)
LEDGER_RECORDS = Metric(
    "serving_ledger_records_total",
    Kind.COUNTER,
    "Records taken (recorded), in the database (committed, repeated), kept in memory since the disk did not take them "
    "(unspooled), given up (refused, lost)",
    ("result",),
)
LEDGER_FAILURES = Metric("serving_ledger_failures_total", Kind.COUNTER, "Times that the ledger's database failed")
LEDGER_LAG = Metric("serving_ledger_lag_seconds", Kind.GAUGE, "Age of the oldest record that the database lacks")
BUDGET_USED = Metric("serving_budget_used_ratio", Kind.GAUGE, "Part of the month's budget that is spent", ("tenant",))
BUILD = Metric("serving_build_info", Kind.GAUGE, "Always 1; the versions that run", ("version", "ray"))

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

# The plugin defines these itself, since a bare vLLM server with the plugin exports them too; a test compares.
ENGINE = (
    Metric("serving_image_queue_pages", Kind.GAUGE, "Pages that wait for an image worker"),
    Metric("serving_image_pages_total", Kind.COUNTER, "Pages made into pixels for the model", ("mode",)),
    Metric(
        "serving_image_failures_total",
        Kind.COUNTER,
        "Pages that were not: `invalid`, `full` (no room in the queue), `unavailable` (no worker), `lost` with theirs",
        ("reason",),
    ),
    Metric("serving_image_queue_seconds", Kind.HISTOGRAM, "Wait for an image worker", buckets=_IMAGE_S),
    Metric("serving_image_work_seconds", Kind.HISTOGRAM, "From a page's start to its pixels", buckets=_IMAGE_S),
    Metric("serving_image_worker_restarts_total", Kind.COUNTER, "Image workers replaced after they died or hung"),
    Metric("serving_repetition_stops_total", Kind.COUNTER, "Answers that the loop stop cut"),
    Metric("serving_wasted_tokens_total", Kind.COUNTER, "Tokens generated for nothing", ("reason",)),
)

_RENDER_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0)

OCR_PAGES = Metric(
    "serving_ocr_pages_total",
    Kind.COUNTER,
    "Pages of documents that are done with: completed, failed",
    ("status",),
)
OCR_PAGE_RETRIES = Metric("serving_ocr_page_retries_total", Kind.COUNTER, "Tries to read a page after its first")
OCR_DOCUMENTS = Metric(
    "serving_ocr_documents_total",
    Kind.COUNTER,
    "Documents taken in, by how they came: request, stream, job",
    ("format", "way"),
)
OCR_REFUSALS = Metric("serving_ocr_refusals_total", Kind.COUNTER, "Requests refused, by error code", ("reason",))
OCR_OPEN = Metric("serving_ocr_open_documents", Kind.GAUGE, "Documents that clients wait for")
OCR_RENDER = Metric(
    "serving_ocr_render_seconds",
    Kind.HISTOGRAM,
    "From a page's turn to its picture, the wait for a worker included",
    (),
    _RENDER_S,
)
OCR_RENDER_QUEUE = Metric(
    "serving_ocr_render_queue_requests",
    Kind.GAUGE,
    "Documents to be opened and pages to be drawn that wait for their turn",
)
OCR_RENDER_CPU = Metric(
    "serving_ocr_render_cpu_seconds_total", Kind.COUNTER, "CPU time that opening documents and drawing pages has taken"
)
OCR_PAGE = Metric(
    "serving_ocr_page_seconds",
    Kind.HISTOGRAM,
    "From a page's turn to its end, all tries and waits included",
    (),
    _WHOLE_REQUEST_S,
)
OCR_STORAGE = Metric(
    "serving_ocr_storage_bytes",
    Kind.GAUGE,
    "Documents in the service's folder and results of jobs in the database; services that share them tell the same",
    ("kind",),
)
OCR_STORAGE_USED = Metric(
    "serving_ocr_storage_used_ratio",
    Kind.GAUGE,
    "The same as a part of what they may take; at 1 new ones are refused",
    ("kind",),
)
OCR_JOBS = Metric("serving_ocr_jobs", Kind.GAUGE, "Jobs in the database; every service tells the same", ("status",))
OCR_JOB_LAG = Metric("serving_ocr_job_lag_seconds", Kind.GAUGE, "How long the oldest queued job has waited")

OCR = (
    OCR_PAGES,
    OCR_PAGE_RETRIES,
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
    """A part of the catalogue as a Markdown table."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.help} |" for metric in metrics
    ]
    return "\n".join(["| metric | kind | labels | |", "| --- | --- | --- | --- |", *rows])


def render_tables() -> str:
    """The whole catalogue, as the README shows it."""
    parts = (("Routers", ROUTER), ("Engine replicas", ENGINE), ("OCR services", OCR))
    return "\n\n".join(f"{who} export:\n\n{render_table(metrics)}" for who, metrics in parts)


if __name__ == "__main__":
    print(render_tables())
