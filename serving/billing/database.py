"""The ledger's database: SQLite or PostgreSQL, its migrations, and the insertion of records, each exactly once.

A batch is one transaction. Rows are inserted by statements of 1, 2, 4 ... rows, built once each: with a statement per
row, or one compiled for every size, Python would cost several times as much as the database.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from serving.billing.periods import month_of
from serving.billing.prices import PriceRow
from serving.billing.records import RequestRecord
from serving.billing.schema import LOST_TRIES, MONTHS, PRICES, REPLICAS, REQUESTS, row_of
from serving.settings.billing import BillingSettings

logger = logging.getLogger(__name__)

_MIGRATIONS = Path(__file__).with_name("migrations")
_MIGRATION_KEY = 0x5E_4B_17  # of PostgreSQL's advisory lock
_MAX_ROWS = 512  # PostgreSQL takes 32,767 parameters at most, a row has 30
_MONTH_KEY = ("month", "tenant_id", "router_id")
_DATA_FAULTS = ("22", "23")  # SQLSTATE classes of errors in the data, which no retry mends


@dataclass(frozen=True, slots=True)
class ReplicaLife:
    """The observed lifetime of an engine replica."""

    replica_id: str
    model: str
    started_ns: int
    seen_ns: int
    nanodollars_per_hour: int = 0


class Database:
    """Connections to the ledger's database, opened on demand. Methods raise what the database driver raises."""

    def __init__(self, settings: BillingSettings) -> None:
        self.url = build_url(settings)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._timeout_s = settings.write_timeout_s
        self.engine = self._build_engine()
        self._add_to_months = self._build_sum()

    async def close(self) -> None:
        await self.engine.dispose()

    async def migrate(self) -> None:
        """Migrate the schema to this version; several processes may do so concurrently."""
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        async with self._alone() as connection:
            await connection.run_sync(_upgrade)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection whose queries see one snapshot of the ledger."""
        async with self.engine.connect() as connection:
            if not self.is_sqlite:
                await connection.execution_options(isolation_level="REPEATABLE READ")
            async with connection.begin():
                yield connection

    async def insert(self, records: Sequence[RequestRecord]) -> int:
        """Insert the records that are new, all or none of them; returns their number."""
        by_id = {record.request_id: record for record in records}
        rows = [row_of(record) for record in by_id.values()]
        new: list[str] = []
        async with self.engine.begin() as connection:
            for block in _blocks(rows):
                statement = _insert_statement(len(block), self.is_sqlite)
                given = await connection.exec_driver_sql(statement, tuple(value for row in block for value in row))
                new.extend(given.scalars())
            await self._insert_what_follows(connection, [by_id[request_id] for request_id in new])
        return len(new)

    async def insert_prices(self, prices: Iterable[PriceRow]) -> None:
        """Insert prices; known ones are left unchanged."""
        rows = [
            {
                "model": row.model,
                "tenant_id": row.tenant_id,
                "version": row.price.version,
                "since_ns": row.since_ns,
                "input_picodollars": row.price.input_picodollars,
                "output_picodollars": row.price.output_picodollars,
                "cached_picodollars": row.price.cached_picodollars,
                "image_picodollars": row.price.image_picodollars,
            }
            for row in prices
        ]
        if rows:
            async with self.engine.begin() as connection:
                await connection.execute(self._insert(PRICES).on_conflict_do_nothing(), rows)

    async def see_replicas(self, lives: Iterable[ReplicaLife]) -> None:
        """Extend the known lifetimes of replicas; routers may report them in any order."""
        rows = [
            {
                "replica_id": life.replica_id,
                "model": life.model,
                "started_ns": life.started_ns,
                "seen_ns": life.seen_ns,
                "nanodollars_per_hour": life.nanodollars_per_hour,
            }
            for life in sorted(lives, key=lambda life: life.replica_id)
        ]
        if not rows:
            return
        insert = self._insert(REPLICAS)
        older = (
            "CASE WHEN excluded.started_ns < replicas.started_ns THEN excluded.started_ns ELSE replicas.started_ns END"
        )
        newer = "CASE WHEN excluded.seen_ns > replicas.seen_ns THEN excluded.seen_ns ELSE replicas.seen_ns END"
        upsert = insert.on_conflict_do_update(
            index_elements=["replica_id"], set_={"started_ns": text(older), "seen_ns": text(newer)}
        )
        async with self.engine.begin() as connection:
            await connection.execute(upsert, rows)

    async def _insert_what_follows(self, connection: AsyncConnection, records: Sequence[RequestRecord]) -> None:
        """Insert the lost tries of new records, and add to the monthly sums."""
        tries = [
            {
                "request_id": record.request_id,
                "number": number,
                "replica_id": lost.replica_id,
                "prompt_tokens": lost.num_prompt_tokens,
                "completion_tokens": lost.num_completion_tokens,
                "ended_ns": record.ended_ns,
            }
            for record in records
            for number, lost in enumerate(record.lost_tries)
        ]
        if tries:
            await connection.execute(LOST_TRIES.insert(), tries)
        counts: Counter[tuple[str, str, str]] = Counter()
        costs: Counter[tuple[str, str, str]] = Counter()
        for record in records:
            key = month_of(record.arrived_ns), record.tenant_id, record.router_id
            counts[key] += 1
            costs[key] += record.cost_nanodollars
        # In order, so that two writers never deadlock.
        sums = [
            {**dict(zip(_MONTH_KEY, key, strict=True)), "num_requests": counts[key], "cost_nanodollars": costs[key]}
            for key in sorted(counts)
        ]
        if sums:
            await connection.execute(self._add_to_months, sums)

    def _build_sum(self) -> sqlite.Insert | postgresql.Insert:
        """The statement that adds to a month's sums. Built once: building it costs as much as executing it."""
        insert = self._insert(MONTHS)
        added = {
            "num_requests": MONTHS.c.num_requests + insert.excluded.num_requests,
            "cost_nanodollars": MONTHS.c.cost_nanodollars + insert.excluded.cost_nanodollars,
        }
        return insert.on_conflict_do_update(index_elements=_MONTH_KEY, set_=added)

    def _insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def _build_engine(self) -> AsyncEngine:
        if not self.is_sqlite:
            timeouts = {"timeout": self._timeout_s, "command_timeout": self._timeout_s}
            return create_async_engine(
                self.url, pool_size=2, max_overflow=4, pool_pre_ping=True, pool_recycle=1800, connect_args=timeouts
            )
        engine = create_async_engine(self.url, pool_size=2, max_overflow=4, connect_args={"timeout": self._timeout_s})
        event.listen(engine.sync_engine, "connect", _set_up_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[AsyncConnection]:
        """A transaction during which no other process migrates."""
        if not self.is_sqlite:
            async with self.engine.begin() as connection:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_KEY})
                yield connection
            return
        fd = os.open(f"{self.url.database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await asyncio.to_thread(fcntl.flock, fd, fcntl.LOCK_EX)
            async with self.engine.begin() as connection:
                yield connection
        finally:
            os.close(fd)


def build_url(settings: BillingSettings) -> URL:
    """The database's URL, with the driver that is used here."""
    if settings.database_url is None:
        return URL.create("sqlite+aiosqlite", database=str(settings.directory / "ledger.db"))
    url = make_url(settings.database_url.get_secret_value().replace("postgres://", "postgresql://", 1))
    backend = url.get_backend_name()
    return url.set(drivername="sqlite+aiosqlite" if backend == "sqlite" else "postgresql+asyncpg")


def is_data_fault(error: BaseException) -> bool:
    """Whether the database refuses a record, so that retrying is useless."""
    if isinstance(error, (OverflowError, DataError, IntegrityError)):
        return True
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    state = str(getattr(error.orig, "sqlstate", None) or "")
    # asyncpg refuses numbers that are too large before sending them, with an error that is also a ValueError.
    return state[:2] in _DATA_FAULTS or isinstance(getattr(error.orig, "__cause__", None), ValueError)


def _upgrade(connection: Connection) -> None:
    # Alembic takes long to import and is only needed here.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun below: Python's default leaves DDL outside of them
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    # Committed data must be on disk, since journals are deleted afterwards.
    cursor.execute("PRAGMA synchronous = FULL")
    # Deleted data must be gone: pages of a job's document must leave no text in the file.
    cursor.execute("PRAGMA secure_delete = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _blocks(rows: Sequence[tuple[object, ...]]) -> Iterable[Sequence[tuple[object, ...]]]:
    """The rows in blocks whose sizes are powers of two, largest first."""
    begin = 0
    while begin < len(rows):
        size = min(_MAX_ROWS, 1 << (len(rows) - begin).bit_length() - 1)
        yield rows[begin : begin + size]
        begin += size


@lru_cache(maxsize=32)
def _insert_statement(num_rows: int, is_sqlite: bool) -> str:
    width = len(REQUESTS.c)
    marks = iter(["?"] * (width * num_rows) if is_sqlite else (f"${i + 1}" for i in range(width * num_rows)))
    values = ",".join("(" + ",".join(next(marks) for _ in range(width)) + ")" for _ in range(num_rows))
    names = ",".join(column.name for column in REQUESTS.c)
    return (
        f"INSERT INTO {REQUESTS.name} ({names}) VALUES {values} "
        "ON CONFLICT (request_id) DO NOTHING RETURNING request_id"
    )
