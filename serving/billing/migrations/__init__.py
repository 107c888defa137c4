"""Alembic's directory: every change of the schema, in order."""
