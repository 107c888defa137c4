"""What was deducted from a request's price."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With a default of the database's, so that routers of the version before can still write while they are replaced.
    op.add_column("requests", Column("credit_nanodollars", BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("requests", "credit_nanodollars")
