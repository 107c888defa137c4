"""Alembic runs this file for every command; the connection is given by `serving.billing.database`."""

from __future__ import annotations

from alembic import context

from serving.billing.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transaction_per_migration=False,
    render_as_batch=True,  # SQLite changes a table by making it anew
)
with context.begin_transaction():
    context.run_migrations()
