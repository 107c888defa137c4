"""The tables of the ledger and of OCR jobs, the same in SQLite and PostgreSQL. Migrations create them; a test keeps the
two consistent.

Money is in nanodollars, times are in nanoseconds since the epoch (UTC), both in 64 bits.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, MetaData, Table, Text

from serving.billing.records import RequestRecord

METADATA = MetaData()

MIXED = "mixed"
"""The mode of a request whose images have several."""


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False)


REQUESTS = Table(
    "requests",
    METADATA,
    Column("request_id", Text, primary_key=True),
    _text("tenant_id"),
    _text("key_id"),
    _text("model"),
    _text("route"),
    _text("outcome"),
    _count("status"),
    _text("error_code"),
    _text("mode"),  # for grouping: the mode of all images, `mixed`, or empty without images
    _text("modes"),  # of every image in order, comma-separated
    _count("num_pages"),
    _count("prompt_tokens"),
    _count("image_tokens"),
    _count("cached_tokens"),
    _count("completion_tokens"),
    _flag("is_estimated"),
    _count("wasted_tokens"),
    _count("cost_nanodollars"),
    _text("price_version"),
    _text("replica_id"),
    _count("num_tries"),
    _text("finish_reason"),
    _count("arrived_ns"),
    _count("first_byte_ns"),
    _count("ended_ns"),
    _count("queue_wait_ns"),
    _text("priority"),
    _flag("is_stream"),
    _text("router_id"),
    Column("credit_nanodollars", BigInteger, nullable=False, server_default="0"),  # the price is this plus the cost
    Index("requests_by_time", "arrived_ns"),
    Index("requests_by_tenant", "tenant_id", "arrived_ns"),
    Index("requests_by_replica", "replica_id", "ended_ns"),
)
"""One row per request, however it ended."""

LOST_TRIES = Table(
    "lost_tries",
    METADATA,
    Column("request_id", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    _text("replica_id"),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    _count("ended_ns"),
    Index("lost_tries_by_replica", "replica_id", "ended_ns"),
)
"""What replicas counted for requests that another replica answered."""

MONTHS = Table(
    "months",
    METADATA,
    Column("month", Text, primary_key=True),
    Column("tenant_id", Text, primary_key=True),
    Column("router_id", Text, primary_key=True),
    _count("num_requests"),
    _count("cost_nanodollars"),
)
"""Sums over `requests`, updated in the same transactions; budgets are compared with them every few seconds. By router,
since each router knows its own spending sooner."""

PRICES = Table(
    "prices",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("tenant_id", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    _count("since_ns"),
    _count("input_picodollars"),
    _count("output_picodollars"),
    Column("cached_picodollars", BigInteger),
    Column("image_picodollars", BigInteger),
)
"""Every price that was ever in force, by what `price_version` refers to."""

REPLICAS = Table(
    "replicas",
    METADATA,
    Column("replica_id", Text, primary_key=True),
    _text("model"),
    _count("started_ns"),
    _count("seen_ns"),
    _count("nanodollars_per_hour"),
)
"""The lifetime of every engine replica, from first to last seen."""

JOBS = Table(
    "ocr_jobs",
    METADATA,
    Column("job_id", Text, primary_key=True),
    _text("owner"),
    _text("status"),
    _text("model"),
    _text("options"),  # as requested, JSON
    _text("document"),  # format, number of pages, size: JSON
    _text("pages"),  # numbers of the pages to be read, from 0: JSON
    _text("sealed_key"),  # the API key, encrypted; empty without one, and when the job has ended
    Column("idempotency_key", Text),
    _text("digest"),  # of what was submitted; for idempotent submission
    _text("error"),  # JSON, empty without one
    _count("num_pages"),
    _count("num_done"),
    _count("num_failed"),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    _count("image_tokens"),
    _count("cost_nanodollars"),
    _count("created_ns"),
    _count("started_ns"),
    _count("finished_ns"),
    _count("expires_ns"),
    _text("lease_owner"),
    _count("lease_until_ns"),
    _count("num_takes"),
    Column("result_bytes", BigInteger, nullable=False, server_default="0"),  # of its pages' results, in bytes
    Index("ocr_jobs_by_owner", "owner", "created_ns"),
    Index("ocr_jobs_by_status", "status", "lease_until_ns"),
    Index("ocr_jobs_by_idempotency_key", "owner", "idempotency_key", unique=True),
)
"""Documents that are read in the background. The document itself is a file named after the job's id."""

JOB_PAGES = Table(
    "ocr_pages",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("page", BigInteger, primary_key=True, autoincrement=False),
    _count("seq"),
    _flag("is_failed"),
    _text("result"),  # as the API returns it, JSON
    _count("finished_ns"),
    Index("ocr_pages_by_seq", "job_id", "seq", unique=True),
)
"""Pages of jobs that have been read, in the order in which they were (`seq`)."""


def row_of(record: RequestRecord) -> tuple[object, ...]:
    """A record in the order of the columns of REQUESTS."""
    tokens, modes = record.tokens, record.modes
    return (
        record.request_id,
        record.tenant_id,
        record.key_id,
        record.model,
        record.route,
        record.outcome.value,
        record.status,
        record.error_code,
        "" if not modes else modes[0] if modes.count(modes[0]) == len(modes) else MIXED,
        ",".join(modes),
        record.num_pages,
        tokens.num_prompt_tokens,
        tokens.num_image_tokens,
        tokens.num_cached_tokens,
        tokens.num_completion_tokens,
        record.is_estimated,
        record.num_wasted_tokens,
        record.cost_nanodollars,
        record.price_version,
        record.replica_id,
        record.num_tries,
        record.finish_reason,
        record.arrived_ns,
        record.first_byte_ns,
        record.ended_ns,
        record.queue_wait_ns,
        record.priority,
        record.is_stream,
        record.router_id,
        record.credit_nanodollars,
    )
