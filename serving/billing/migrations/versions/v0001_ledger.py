"""The ledger's first tables.

Written out instead of taken from the schema: a migration stays as it is when the schema changes.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, PrimaryKeyConstraint, Text
from sqlalchemy.schema import SchemaItem

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_requests()
    op.create_table(
        "lost_tries",
        *_texts("request_id"),
        *_counts("number"),
        *_texts("replica_id"),
        *_counts("prompt_tokens", "completion_tokens", "ended_ns"),
        PrimaryKeyConstraint("request_id", "number"),
    )
    op.create_index("lost_tries_by_replica", "lost_tries", ["replica_id", "ended_ns"])
    op.create_table(
        "months",
        *_texts("month", "tenant_id", "router_id"),
        *_counts("num_requests", "cost_nanodollars"),
        PrimaryKeyConstraint("month", "tenant_id", "router_id"),
    )
    op.create_table(
        "prices",
        *_texts("model", "tenant_id", "version"),
        *_counts("since_ns", "input_picodollars", "output_picodollars"),
        Column("cached_picodollars", BigInteger),
        Column("image_picodollars", BigInteger),
        PrimaryKeyConstraint("model", "tenant_id", "version"),
    )
    op.create_table(
        "replicas",
        *_texts("replica_id", "model"),
        *_counts("started_ns", "seen_ns", "nanodollars_per_hour"),
        PrimaryKeyConstraint("replica_id"),
    )


def downgrade() -> None:
    for table in ("replicas", "prices", "months", "lost_tries", "requests"):
        op.drop_table(table)


def _create_requests() -> None:
    op.create_table(
        "requests",
        *_texts("request_id", "tenant_id", "key_id", "model", "route", "outcome"),
        *_counts("status"),
        *_texts("error_code", "mode", "modes"),
        *_counts("num_pages", "prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens"),
        Column("is_estimated", Boolean, nullable=False),
        *_counts("wasted_tokens", "cost_nanodollars"),
        *_texts("price_version", "replica_id"),
        *_counts("num_tries"),
        *_texts("finish_reason"),
        *_counts("arrived_ns", "first_byte_ns", "ended_ns", "queue_wait_ns"),
        *_texts("priority"),
        Column("is_stream", Boolean, nullable=False),
        *_texts("router_id"),
        PrimaryKeyConstraint("request_id"),
    )
    op.create_index("requests_by_time", "requests", ["arrived_ns"])
    op.create_index("requests_by_tenant", "requests", ["tenant_id", "arrived_ns"])
    op.create_index("requests_by_replica", "requests", ["replica_id", "ended_ns"])


def _texts(*names: str) -> list[SchemaItem]:
    return [Column(name, Text, nullable=False) for name in names]


def _counts(*names: str) -> list[SchemaItem]:
    return [Column(name, BigInteger, nullable=False, autoincrement=False) for name in names]
