"""Access to the job tables in the ledger's database (SQLite or PostgreSQL): transactions and shared queries."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from serving.billing.database import Database
from serving.billing.schema import JOBS
from serving.errors import JobNotFoundError, OverloadedError
from serving.ocr.jobs.model import NS, JobRow, read_job


class JobDatabase:
    """Connections to the job tables. Methods raise OverloadedError when the database is unavailable.

    Every writing transaction begins with a write: SQLite makes those wait for each other instead of failing.
    """

    def __init__(self, database: Database, keep_results_s: float, *, migrates: bool = True) -> None:
        """Nothing is connected yet.

        Args:
            database: need not be reachable yet.
            keep_results_s: how long a job is kept after it has ended, in seconds.
            migrates: whether to bring the database to this version's schema on first use.
        """
        self._database = database
        self._keep_results_s = keep_results_s
        self._is_prepared = not migrates
        self._preparing = asyncio.Lock()

    async def find_one(self, where: ColumnElement[bool]) -> JobRow:
        """The job that matches; raises JobNotFoundError when none does."""
        async with self.reading() as connection:
            row = (await connection.execute(select(JOBS).where(where))).one_or_none()
        if row is None:
            raise JobNotFoundError("There is no such job.")
        return read_job(row)

    def ended(self, status: str) -> dict[str, Any]:
        """The changes to a job's row when it ends now. They include deleting its API key."""
        now_ns = time.time_ns()
        ending = {"status": status, "finished_ns": now_ns, "expires_ns": now_ns + round(self._keep_results_s * NS)}
        return ending | {"sealed_key": "", "lease_owner": "", "lease_until_ns": 0}

    async def empty_log(self) -> None:
        """Fold SQLite's write-ahead log into the database: until then it still contains what was deleted."""
        if self._database.is_sqlite:
            await asyncio.to_thread(_fold_log, str(self._database.url.database))

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A writing transaction. IntegrityError is not translated."""
        async with self._usable():
            await self._prepare()
            async with self._database.engine.begin() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        async with self._usable():
            await self._prepare()
            async with self._database.engine.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def _usable(self) -> AsyncIterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            message = "The job database is unavailable; try again shortly."
            raise OverloadedError(message, 5.0, code="database_unavailable") from error

    async def _prepare(self) -> None:
        async with self._preparing:
            if not self._is_prepared:
                await self._database.migrate()
                self._is_prepared = True


def _fold_log(file: str) -> None:
    with contextlib.closing(sqlite3.connect(file, timeout=5)) as connection, contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
