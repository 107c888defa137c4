"""The OCR service's jobs and the pages that they have read."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, PrimaryKeyConstraint, Text
from sqlalchemy.schema import SchemaItem

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ocr_jobs",
        *_texts("job_id", "owner", "status", "model", "options", "document", "pages", "sealed_key"),
        Column("idempotency_key", Text),
        *_texts("digest", "error"),
        *_counts("num_pages", "num_done", "num_failed"),
        *_counts("prompt_tokens", "completion_tokens", "image_tokens", "cost_nanodollars"),
        *_counts("created_ns", "started_ns", "finished_ns", "expires_ns"),
        *_texts("lease_owner"),
        *_counts("lease_until_ns", "num_takes"),
        PrimaryKeyConstraint("job_id"),
    )
    op.create_index("ocr_jobs_by_owner", "ocr_jobs", ["owner", "created_ns"])
    op.create_index("ocr_jobs_by_status", "ocr_jobs", ["status", "lease_until_ns"])
    op.create_index("ocr_jobs_by_idempotency_key", "ocr_jobs", ["owner", "idempotency_key"], unique=True)
    op.create_table(
        "ocr_pages",
        *_texts("job_id"),
        *_counts("page", "seq"),
        Column("is_failed", Boolean, nullable=False),
        *_texts("result"),
        *_counts("finished_ns"),
        PrimaryKeyConstraint("job_id", "page"),
    )
    op.create_index("ocr_pages_by_seq", "ocr_pages", ["job_id", "seq"], unique=True)


def downgrade() -> None:
    for table in ("ocr_pages", "ocr_jobs"):
        op.drop_table(table)


def _texts(*names: str) -> list[SchemaItem]:
    return [Column(name, Text, nullable=False) for name in names]


def _counts(*names: str) -> list[SchemaItem]:
    return [Column(name, BigInteger, nullable=False, autoincrement=False) for name in names]
