"""The size of a job's results."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With a default of the database's, so that services of the version before can still write while they are replaced.
    op.add_column("ocr_jobs", Column("result_bytes", BigInteger, nullable=False, server_default="0"))
    # In characters: near enough for jobs that are there already.
    op.execute(
        "UPDATE ocr_jobs SET result_bytes = (SELECT COALESCE(SUM(LENGTH(result)), 0) FROM ocr_pages"
        " WHERE ocr_pages.job_id = ocr_jobs.job_id)"
    )


def downgrade() -> None:
    op.drop_column("ocr_jobs", "result_bytes")
