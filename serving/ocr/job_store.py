"""Jobs and their pages in the database, the same in SQLite and PostgreSQL. Money is nanodollars, times nanoseconds.

A service reads a job only while it holds its lease, and every write for a job says so: `store_page` puts a page in and
counts it in one transaction, which does nothing when the lease has gone to another or the job was cancelled or deleted.
So a page counts once, whoever reads it. Every transaction begins with a write, which SQLite lets wait for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from serving.billing.database import Database
from serving.billing.schema import JOB_PAGES, JOBS
from serving.errors import InvalidRequestError, JobNotFoundError, OverloadedError, RateLimitError
from serving.ocr.reader import Failure, Usage
from serving.ocr.shown import PageResult, show_failure, show_usage
from serving.ocr_settings import JobSettings

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = "queued", "running", "completed", "failed", "cancelled"
OPEN = (QUEUED, RUNNING)
STATES = (QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED)
_NS = 10**9


class LeaseLostError(Exception):
    """The job is no longer this service's to read: cancelled, deleted, or taken over."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What is submitted."""

    owner: str
    model: str
    options: dict[str, Any]
    document: dict[str, Any]
    pages: Sequence[int]
    sealed_key: str
    digest: str
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A row."""

    job_id: str
    owner: str
    status: str
    options: dict[str, Any]
    document: dict[str, Any]
    pages: tuple[int, ...]
    sealed_key: str
    digest: str
    error: dict[str, Any] | None
    num_done: int
    num_failed: int
    usage: Usage
    created_ns: int
    started_ns: int
    finished_ns: int
    expires_ns: int
    num_takes: int

    def shown(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "id": self.job_id,
            "object": "ocr.job",
            "status": self.status,
            "created_at": self.created_ns // _NS,
            "started_at": self.started_ns // _NS or None,
            "finished_at": self.finished_ns // _NS or None,
            "expires_at": self.expires_ns // _NS or None,
            "model": self.options["model"],
            "document": self.document,
            "options": {name: value for name, value in self.options.items() if name != "model"},
            "pages_total": len(self.pages),
            "pages_done": self.num_done,
            "pages_failed": self.num_failed,
            "usage": show_usage(self.usage, self.num_done, self.num_failed),
            "error": self.error,
        }


class JobStore:
    """All of it. Methods raise OverloadedError when the database cannot be used."""

    def __init__(self, database: Database, settings: JobSettings, service_id: str, *, migrates: bool = True) -> None:
        """Args:
        database: need not be there yet.
        settings: leases and how long things are kept.
        service_id: names this life of the service in leases.
        migrates: whether it brings the database to this version's schema, as soon as it can.
        """
        self._database = database
        self._settings = settings
        self._service_id = service_id
        self._is_prepared = not migrates
        self._preparing = asyncio.Lock()

    async def add(self, job_id: str, new: NewJob) -> Job:
        """A new job; the one that is there already when the owner has used the idempotency key before.

        Raises:
            RateLimitError: the owner has too many open.
            InvalidRequestError: the key was used for something else.
        """
        now_ns = time.time_ns()
        row = {
            "job_id": job_id,
            "owner": new.owner,
            "status": QUEUED,
            "model": new.model,
            "options": _dump(new.options),
            "document": _dump(new.document),
            "pages": _dump(list(new.pages)),
            "sealed_key": new.sealed_key,
            "idempotency_key": new.idempotency_key,
            "digest": new.digest,
            "error": "",
            "created_ns": now_ns,
            "num_pages": len(new.pages),
            "lease_owner": "",
        } | dict.fromkeys(_ZEROS, 0)
        try:
            async with self._writing() as connection:
                await connection.execute(insert(JOBS).values(row))
                await self._check_open(connection, new.owner)
        except IntegrityError:
            return await self.find_repeated(new.owner, new.idempotency_key or "", new.digest)
        return await self.find(job_id, new.owner)

    async def find_repeated(self, owner: str, idempotency_key: str, digest: str) -> Job:
        """The job that an idempotency key has made.

        Raises:
            JobNotFoundError: none.
            InvalidRequestError: something else was submitted with it.
        """
        job = await self._find_one(and_(JOBS.c.owner == owner, JOBS.c.idempotency_key == idempotency_key))
        if job.digest != digest:
            raise InvalidRequestError(
                "This Idempotency-Key was used with another document or other options.", code="idempotency_key_reused"
            )
        return job

    async def _check_open(self, connection: AsyncConnection, owner: str) -> None:
        open_ = and_(JOBS.c.owner == owner, JOBS.c.status.in_(OPEN))
        count = (await connection.execute(select(func.count()).where(open_))).scalar_one()
        if count > self._settings.max_open_per_tenant:
            raise RateLimitError(
                f"You have {self._settings.max_open_per_tenant} jobs open, which is as many as may be; wait for some.",
                30.0,
                code="too_many_jobs",
            )

    async def find(self, job_id: str, owner: str) -> Job:
        """Raises JobNotFoundError for one that is not there, or another's."""
        return await self._find_one(and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner))

    async def list_jobs(self, owner: str, limit: int, after: str | None) -> tuple[list[Job], bool]:
        """An owner's jobs, newest first, and whether there are more.

        Raises:
            JobNotFoundError: `after` is none of them.
        """
        where: ColumnElement[bool] = JOBS.c.owner == owner
        if after is not None:
            last = await self.find(after, owner)
            older = and_(JOBS.c.created_ns == last.created_ns, JOBS.c.job_id < last.job_id)
            where = and_(where, or_(JOBS.c.created_ns < last.created_ns, older))
        order = (JOBS.c.created_ns.desc(), JOBS.c.job_id.desc())
        async with self._reading() as connection:
            rows = (await connection.execute(select(JOBS).where(where).order_by(*order).limit(limit + 1))).all()
        return [_read_job(row) for row in rows[:limit]], len(rows) > limit

    async def list_pages(self, job_id: str, owner: str, limit: int, after: int) -> tuple[list[dict[str, Any]], bool]:
        """Pages in the order in which they were done, from the one after `seq` on."""
        await self.find(job_id, owner)
        where = and_(JOB_PAGES.c.job_id == job_id, JOB_PAGES.c.seq > after)
        wanted = select(JOB_PAGES.c.seq, JOB_PAGES.c.result).where(where).order_by(JOB_PAGES.c.seq).limit(limit + 1)
        async with self._reading() as connection:
            rows = (await connection.execute(wanted)).all()
        return [{**orjson.loads(row.result), "seq": row.seq} for row in rows[:limit]], len(rows) > limit

    async def cancel(self, job_id: str, owner: str) -> Job:
        """End a job that has not ended; pages that are done stay, the key goes."""
        where = and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner, JOBS.c.status.in_(OPEN))
        async with self._writing() as connection:
            await connection.execute(update(JOBS).where(where).values(self._ended(CANCELLED)))
        return await self.find(job_id, owner)

    async def delete(self, job_id: str, owner: str) -> None:
        """A job with all that was read. The document's file is the caller's to remove."""
        async with self._writing() as connection:
            where = and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner)
            if not (await connection.execute(delete(JOBS).where(where))).rowcount:
                raise JobNotFoundError("There is no such job.")
            await connection.execute(delete(JOB_PAGES).where(JOB_PAGES.c.job_id == job_id))
        await self._empty_log()

    # For who reads them

    async def take(self) -> Job | None:
        """The oldest job that nobody reads, now this service's; None when there is none."""
        now_ns = time.time_ns()
        free = and_(JOBS.c.status.in_(OPEN), JOBS.c.lease_until_ns < now_ns)
        oldest = select(JOBS.c.job_id).where(free).order_by(JOBS.c.created_ns).limit(8)
        async with self._reading() as connection:
            candidates = (await connection.execute(oldest)).scalars().all()
        for job_id in candidates:
            values = {
                "status": RUNNING,
                "lease_owner": self._service_id,
                "lease_until_ns": self._lease_end(),
                "num_takes": JOBS.c.num_takes + 1,
                "started_ns": func.coalesce(func.nullif(JOBS.c.started_ns, 0), now_ns),
            }
            async with self._writing() as connection:
                done = await connection.execute(update(JOBS).where(and_(JOBS.c.job_id == job_id, free)).values(values))
            if done.rowcount:  # of two services that saw it, one
                return await self._find_one(JOBS.c.job_id == job_id)
        return None

    async def read_done(self, job_id: str) -> set[int]:
        """Pages of a job that are in the database."""
        async with self._reading() as connection:
            found = await connection.execute(select(JOB_PAGES.c.page).where(JOB_PAGES.c.job_id == job_id))
            return set(found.scalars())

    async def renew(self, job_id: str) -> None:
        """Raises LeaseLostError when the job is no longer this service's."""
        async with self._writing() as connection:
            await self._update_own(connection, job_id, {"lease_until_ns": self._lease_end()})

    async def store_page(self, job_id: str, result: PageResult) -> None:
        """Put a page in and count it, both or neither.

        Raises:
            LeaseLostError: the job is no longer this service's.
        """
        used = result.usage
        changes = {
            "num_done": JOBS.c.num_done + 1,
            "num_failed": JOBS.c.num_failed + int(result.is_failed),
            "prompt_tokens": JOBS.c.prompt_tokens + used.prompt_tokens,
            "completion_tokens": JOBS.c.completion_tokens + used.completion_tokens,
            "image_tokens": JOBS.c.image_tokens + used.image_tokens,
            "cost_nanodollars": JOBS.c.cost_nanodollars + used.cost_nanodollars,
            "lease_until_ns": self._lease_end(),
        }
        async with self._writing() as connection:
            await self._update_own(connection, job_id, changes)
            count = select(JOBS.c.num_done).where(JOBS.c.job_id == job_id)
            row = {
                "job_id": job_id,
                "page": result.index,
                "seq": (await connection.execute(count)).scalar_one(),
                "is_failed": result.is_failed,
                "result": _dump(result.shown),
                "finished_ns": time.time_ns(),
            }
            await connection.execute(insert(JOB_PAGES).values(row))

    async def finish(self, job_id: str, failure: Failure | None = None) -> None:
        """The job has ended; its key goes.

        Raises:
            LeaseLostError: it is no longer this service's.
        """
        changes = self._ended(FAILED if failure is not None else COMPLETED)
        changes["error"] = _dump(show_failure(failure)) if failure is not None else ""
        async with self._writing() as connection:
            await self._update_own(connection, job_id, changes)

    async def leave(self, job_id: str) -> None:
        """Give a job back before it has ended, so that another service can take it at once."""
        with contextlib.suppress(LeaseLostError):
            async with self._writing() as connection:
                await self._update_own(connection, job_id, {"lease_until_ns": 0, "lease_owner": ""})

    # For who cleans up

    async def end_old(self) -> None:
        """Fail jobs that have been open for longer than they may."""
        before_ns = time.time_ns() - round(self._settings.max_age_s * _NS)
        failure = Failure("job_expired", "The job did not end within its time.")
        changes = self._ended(FAILED) | {"error": _dump(show_failure(failure))}
        where = and_(JOBS.c.status.in_(OPEN), JOBS.c.created_ns < before_ns)
        async with self._writing() as connection:
            await connection.execute(update(JOBS).where(where).values(changes))

    async def delete_expired(self) -> list[str]:
        """Delete what has been kept for long enough; gives the ids."""
        async with self._writing() as connection:
            expired = and_(JOBS.c.expires_ns > 0, JOBS.c.expires_ns < time.time_ns())
            gone = list((await connection.execute(delete(JOBS).where(expired).returning(JOBS.c.job_id))).scalars())
            if gone:
                await connection.execute(delete(JOB_PAGES).where(JOB_PAGES.c.job_id.in_(gone)))
        if gone:
            await self._empty_log()
        return gone

    async def find_needed(self, job_ids: Sequence[str]) -> set[str]:
        """Of these jobs, those whose document is still wanted."""
        kept_ns = time.time_ns() - round(self._settings.keep_documents_s * _NS)
        wanted = or_(JOBS.c.status.in_(OPEN), JOBS.c.finished_ns > kept_ns)
        async with self._reading() as connection:
            found = await connection.execute(select(JOBS.c.job_id).where(and_(JOBS.c.job_id.in_(job_ids), wanted)))
            return set(found.scalars())

    async def count_states(self) -> tuple[dict[str, int], float]:
        """Jobs by status, and how long the oldest queued one has waited, in seconds."""
        oldest = select(func.min(JOBS.c.created_ns)).where(JOBS.c.status == QUEUED)
        async with self._reading() as connection:
            rows = (await connection.execute(select(JOBS.c.status, func.count()).group_by(JOBS.c.status))).all()
            first_ns = (await connection.execute(oldest)).scalar_one()
        counts = dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}
        return counts, max(0.0, (time.time_ns() - first_ns) / _NS) if first_ns else 0.0

    # Inside

    def _ended(self, status: str) -> dict[str, Any]:
        now_ns = time.time_ns()
        expires_ns = now_ns + round(self._settings.keep_results_s * _NS)
        ending = {"status": status, "finished_ns": now_ns, "expires_ns": expires_ns}
        return ending | {"sealed_key": "", "lease_owner": "", "lease_until_ns": 0}

    def _lease_end(self) -> int:
        return time.time_ns() + round(self._settings.lease_s * _NS)

    async def _update_own(self, connection: AsyncConnection, job_id: str, changes: dict[str, Any]) -> None:
        ours = and_(JOBS.c.job_id == job_id, JOBS.c.status == RUNNING, JOBS.c.lease_owner == self._service_id)
        if not (await connection.execute(update(JOBS).where(ours).values(changes))).rowcount:
            raise LeaseLostError(job_id)

    async def _find_one(self, where: ColumnElement[bool]) -> Job:
        async with self._reading() as connection:
            row = (await connection.execute(select(JOBS).where(where))).one_or_none()
        if row is None:
            raise JobNotFoundError("There is no such job.")
        return _read_job(row)

    async def _empty_log(self) -> None:
        """SQLite's log still holds what was deleted until it is folded into the file."""
        if self._database.is_sqlite:
            await asyncio.to_thread(_fold_log, str(self._database.url.database))

    @contextlib.asynccontextmanager
    async def _usable(self) -> AsyncIterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise OverloadedError("The jobs' database cannot be used now.", 5.0, code="database_unavailable") from error

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        async with self._usable():
            await self._prepare()
            async with self._database.engine.begin() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        async with self._usable():
            await self._prepare()
            async with self._database.engine.connect() as connection:
                yield connection

    async def _prepare(self) -> None:
        async with self._preparing:
            if not self._is_prepared:
                await self._database.migrate()
                self._is_prepared = True


_ZEROS = (
    "num_done",
    "num_failed",
    "prompt_tokens",
    "completion_tokens",
    "image_tokens",
    "cost_nanodollars",
    "started_ns",
    "finished_ns",
    "expires_ns",
    "lease_until_ns",
    "num_takes",
)


def _fold_log(file: str) -> None:
    with contextlib.closing(sqlite3.connect(file, timeout=5)) as connection, contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def new_job_id() -> str:
    return f"job-{uuid.uuid4().hex}"


def _dump(value: Any) -> str:
    return orjson.dumps(value).decode()


def _read_job(row: Any) -> Job:
    usage = Usage(row.prompt_tokens, row.completion_tokens, row.image_tokens, row.cost_nanodollars)
    return Job(
        job_id=row.job_id,
        owner=row.owner,
        status=row.status,
        options=orjson.loads(row.options),
        document=orjson.loads(row.document),
        pages=tuple(orjson.loads(row.pages)),
        sealed_key=row.sealed_key,
        digest=row.digest,
        error=orjson.loads(row.error) if row.error else None,
        num_done=row.num_done,
        num_failed=row.num_failed,
        usage=usage,
        created_ns=row.created_ns,
        started_ns=row.started_ns,
        finished_ns=row.finished_ns,
        expires_ns=row.expires_ns,
        num_takes=row.num_takes,
    )
