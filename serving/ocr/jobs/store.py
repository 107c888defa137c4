"""Jobs from the point of view of their owners: submit, look up, cancel, delete. The same in SQLite and PostgreSQL."""

from __future__ import annotations

import time

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from serving.billing.schema import JOB_PAGES, JOBS
from serving.errors import InvalidRequestError, JobNotFoundError, RateLimitError
from serving.ocr.jobs.database import JobDatabase
from serving.ocr.jobs.model import CANCELLED, OPEN, QUEUED, JobRow, NewJob, dump, read_job
from serving.ocr_api.shapes import OcrPage

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
    "result_bytes",
)


class JobStore:
    """Finds an owner's own jobs only. Methods raise OverloadedError when the database is unavailable."""

    def __init__(self, jobs: JobDatabase, max_open_per_tenant: int) -> None:
        self._jobs = jobs
        self._max_open = max_open_per_tenant

    async def add(self, job_id: str, new: NewJob) -> JobRow:
        """Add a job, or return the existing one when the owner has used the idempotency key before.

        Raises:
            RateLimitError: the owner has too many open jobs.
            InvalidRequestError: the key was used for a different submission.
        """
        now_ns = time.time_ns()
        row = {
            "job_id": job_id,
            "owner": new.owner,
            "status": QUEUED,
            "model": new.model,
            "options": dump(new.options),
            "document": new.document.model_dump_json(),
            "pages": dump(list(new.pages)),
            "sealed_key": new.sealed_key,
            "idempotency_key": new.idempotency_key,
            "digest": new.digest,
            "error": "",
            "created_ns": now_ns,
            "num_pages": len(new.pages),
            "lease_owner": "",
        } | dict.fromkeys(_ZEROS, 0)
        try:
            async with self._jobs.writing() as connection:
                await connection.execute(insert(JOBS).values(row))
                await self._check_open(connection, new.owner)
        except IntegrityError:
            return await self.find_repeated(new.owner, new.idempotency_key or "", new.digest)
        return await self.find(job_id, new.owner)

    async def find_repeated(self, owner: str, idempotency_key: str, digest: str) -> JobRow:
        """The job that was submitted with an idempotency key.

        Raises:
            JobNotFoundError: no job was.
            InvalidRequestError: the key was used for a different submission.
        """
        job = await self._jobs.find_one(and_(JOBS.c.owner == owner, JOBS.c.idempotency_key == idempotency_key))
        if job.digest != digest:
            raise InvalidRequestError(
                "This Idempotency-Key was used for a different document or different options; use a new one.",
                code="idempotency_key_reused",
            )
        return job

    async def _check_open(self, connection: AsyncConnection, owner: str) -> None:
        open_ = and_(JOBS.c.owner == owner, JOBS.c.status.in_(OPEN))
        count = (await connection.execute(select(func.count()).where(open_))).scalar_one()
        if count > self._max_open:
            raise RateLimitError(
                f"You have {self._max_open} open jobs, the most that one tenant may have; wait for some to end.",
                30.0,
                code="too_many_jobs",
            )

    async def find(self, job_id: str, owner: str) -> JobRow:
        """A job; raises JobNotFoundError when it does not exist or has another owner."""
        return await self._jobs.find_one(and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner))

    async def list_jobs(self, owner: str, limit: int, after: str | None) -> tuple[list[JobRow], bool]:
        """A page of an owner's jobs, newest first, and whether more follow.

        Raises:
            JobNotFoundError: `after` is not one of them.
        """
        where: ColumnElement[bool] = JOBS.c.owner == owner
        if after is not None:
            last = await self.find(after, owner)
            older = and_(JOBS.c.created_ns == last.created_ns, JOBS.c.job_id < last.job_id)
            where = and_(where, or_(JOBS.c.created_ns < last.created_ns, older))
        order = (JOBS.c.created_ns.desc(), JOBS.c.job_id.desc())
        async with self._jobs.reading() as connection:
            rows = (await connection.execute(select(JOBS).where(where).order_by(*order).limit(limit + 1))).all()
        return [read_job(row) for row in rows[:limit]], len(rows) > limit

    async def list_pages(self, job_id: str, owner: str, limit: int, after: int) -> tuple[list[OcrPage], bool]:
        """Pages in the order in which they finished, starting after the one whose `seq` is `after`."""
        await self.find(job_id, owner)
        where = and_(JOB_PAGES.c.job_id == job_id, JOB_PAGES.c.seq > after)
        wanted = select(JOB_PAGES.c.seq, JOB_PAGES.c.result).where(where).order_by(JOB_PAGES.c.seq).limit(limit + 1)
        async with self._jobs.reading() as connection:
            rows = (await connection.execute(wanted)).all()
        pages = [OcrPage.model_validate_json(row.result).model_copy(update={"seq": row.seq}) for row in rows[:limit]]
        return pages, len(rows) > limit

    async def cancel(self, job_id: str, owner: str) -> JobRow:
        """Cancel a job that has not ended. Finished pages are kept; the API key is deleted."""
        where = and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner, JOBS.c.status.in_(OPEN))
        async with self._jobs.writing() as connection:
            await connection.execute(update(JOBS).where(where).values(self._jobs.ended(CANCELLED)))
        return await self.find(job_id, owner)

    async def delete(self, job_id: str, owner: str) -> None:
        """Delete a job and its results. The caller removes the document's file."""
        async with self._jobs.writing() as connection:
            where = and_(JOBS.c.job_id == job_id, JOBS.c.owner == owner)
            if not (await connection.execute(delete(JOBS).where(where))).rowcount:
                raise JobNotFoundError("There is no such job.")
            await connection.execute(delete(JOB_PAGES).where(JOB_PAGES.c.job_id == job_id))
        await self._jobs.empty_log()
