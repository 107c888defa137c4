"""Deletes expired jobs and their results, documents that are no longer needed, and abandoned uploads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from sqlalchemy import and_, delete, func, or_, select, update

from serving.billing.schema import JOB_PAGES, JOBS
from serving.errors import ServingError
from serving.ocr.jobs.database import JobDatabase
from serving.ocr.jobs.model import FAILED, NS, OPEN, QUEUED, STATES
from serving.ocr.limits.storage import Storage
from serving.ocr.reading.pages import PageFailure
from serving.ocr.reading.results import build_error
from serving.settings.ocr import OcrSettings
from serving.settings.router import LimitSettings

logger = logging.getLogger(__name__)

_SWEEP_S = 30.0
_MAX_IDS = 500
"""Per SQL statement."""
_YOUNG_S = 600.0
"""A file may exist this long before its job does."""


class JobSweeper:
    """One per process. Several can run on the same database and folder."""

    def __init__(self, jobs: JobDatabase, settings: OcrSettings, limits: LimitSettings, storage: Storage) -> None:
        self._jobs = jobs
        self._settings = settings.jobs
        self.storage = storage
        slowest_s = max(settings.max_document_bytes, limits.max_body_bytes) / limits.min_body_bytes_per_s
        self._max_upload_s = slowest_s + limits.body_timeout_s

    async def sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except (ServingError, OSError) as error:
                logger.warning("cannot remove old jobs, retrying: %s", error)
            try:
                await self.look()
            except (ServingError, OSError) as error:
                logger.warning("cannot count what is stored, retrying: %s", error)
            await asyncio.sleep(_SWEEP_S)

    async def look(self) -> None:
        """Count the space that documents and results use, including those of other services.

        Raises:
            OverloadedError: the database is unavailable; documents are counted nevertheless.
            OSError: a folder cannot be read.
        """
        await self.storage.look(self._find_owners)
        size = func.sum(JOBS.c.result_bytes)
        async with self._jobs.reading() as connection:
            rows = (await connection.execute(select(JOBS.c.owner, size).group_by(JOBS.c.owner))).all()
        self.storage.see_results({owner: int(num_bytes) for owner, num_bytes in rows})

    async def _find_owners(self, job_ids: Collection[str]) -> dict[str, str]:
        """Owners of jobs, by job id; none while the database is unavailable."""
        owners: dict[str, str] = {}
        ids = list(job_ids)
        with contextlib.suppress(ServingError):
            for begin in range(0, len(ids), _MAX_IDS):
                wanted = select(JOBS.c.job_id, JOBS.c.owner).where(JOBS.c.job_id.in_(ids[begin : begin + _MAX_IDS]))
                async with self._jobs.reading() as connection:
                    rows = (await connection.execute(wanted)).all()
                owners.update((job_id, owner) for job_id, owner in rows)
        return owners

    async def sweep(self) -> None:
        """Delete once what need not be kept any longer.

        Raises:
            OverloadedError: the database is unavailable.
            OSError: a file cannot be removed.
        """
        documents, uploads = self.storage.documents, self.storage.uploads
        await self._end_old()
        for job_id in await self._delete_expired():
            await self.storage.remove(documents / job_id)
        old = await asyncio.to_thread(_list_old, documents, time.time() - _YOUNG_S)
        needed = await self._find_needed(old) if old else set()
        for job_id in old:
            if job_id not in needed:
                await self.storage.remove(documents / job_id)
        before_s = time.time() - self._max_upload_s - _YOUNG_S
        for name in await asyncio.to_thread(_list_old, uploads, before_s):
            await self.storage.remove(uploads / name)

    async def count_states(self) -> tuple[dict[str, int], float]:
        """Number of jobs by status, and the age of the oldest queued one in seconds."""
        oldest = select(func.min(JOBS.c.created_ns)).where(JOBS.c.status == QUEUED)
        async with self._jobs.reading() as connection:
            rows = (await connection.execute(select(JOBS.c.status, func.count()).group_by(JOBS.c.status))).all()
            first_ns = (await connection.execute(oldest)).scalar_one()
        counts = dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}
        return counts, max(0.0, (time.time_ns() - first_ns) / NS) if first_ns else 0.0

    async def _end_old(self) -> None:
        """Fail jobs that have been open for longer than `max_age_s`."""
        before_ns = time.time_ns() - round(self._settings.max_age_s * NS)
        failure = PageFailure("job_expired", "The job did not end within the time that a job has.")
        changes = self._jobs.ended(FAILED) | {"error": build_error(failure).model_dump_json()}
        where = and_(JOBS.c.status.in_(OPEN), JOBS.c.created_ns < before_ns)
        async with self._jobs.writing() as connection:
            await connection.execute(update(JOBS).where(where).values(changes))

    async def _delete_expired(self) -> list[str]:
        """Delete expired jobs and return their ids."""
        async with self._jobs.writing() as connection:
            expired = and_(JOBS.c.expires_ns > 0, JOBS.c.expires_ns < time.time_ns())
            gone = list((await connection.execute(delete(JOBS).where(expired).returning(JOBS.c.job_id))).scalars())
            if gone:
                await connection.execute(delete(JOB_PAGES).where(JOB_PAGES.c.job_id.in_(gone)))
        if gone:
            await self._jobs.empty_log()
        return gone

    async def _find_needed(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the jobs whose document is still needed."""
        kept_ns = time.time_ns() - round(self._settings.keep_documents_s * NS)
        wanted = or_(JOBS.c.status.in_(OPEN), JOBS.c.finished_ns > kept_ns)
        async with self._jobs.reading() as connection:
            found = await connection.execute(select(JOBS.c.job_id).where(and_(JOBS.c.job_id.in_(job_ids), wanted)))
            return set(found.scalars())


def _list_old(folder: Path, before_s: float) -> Sequence[str]:
    """Names of files that were last written before a time."""
    names = []
    for file in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < before_s:
                names.append(file.name)
    return names
