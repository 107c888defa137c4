"""The catalogue: every metric that the stack itself exports, in one place.

`python -m serving.telemetry.catalogue` prints it as the table that the README holds.

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
    """One metric family. `source` says which process exports it."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: str = "router"


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
SPOOL_RECORDS = Metric("serving_ledger_spool_records", Kind.GAUGE, "Records that the database does not hold yet")
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
    REPLICA_WORK,
    BREAKERS,
    RETRIES,
    REFUSALS,
    SPOOL_RECORDS,
    LEDGER_LAG,
    BUDGET_USED,
    BUILD,
)


def render_table(metrics: tuple[Metric, ...] = ROUTER) -> str:
    """The catalogue as a Markdown table."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.help} |" for metric in metrics
    ]
    return "\n".join(["| metric | kind | labels | |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(render_table())
