"""Jobs as services read them: each under a lease, which every write for it names.

`store_page` puts a page in and counts it in one transaction, which does nothing when the lease has gone to another or
the job was cancelled or deleted. So a page counts once, whoever reads it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serving.billing.credits import SERVICE_MARK
from serving.billing.schema import JOB_PAGES, JOBS, REQUESTS
from serving.ocr.jobs.database import JobDatabase
from serving.ocr.jobs.model import COMPLETED, FAILED, NS, OPEN, RUNNING, JobRow, find_page
from serving.ocr.jobs.turns import JobTurns, OwnerJobs
from serving.ocr.reading.pages import PageFailure
from serving.ocr.reading.results import PageResult, build_error

_CLOCKS_S = 600.0
"""By so much a router's clock may be behind a service's."""

_MAX_CANDIDATES = 8
"""Tenants, and jobs of each, that are tried before it is another poll's turn."""


class LeaseLostError(Exception):
    """The job is no longer this service's to read: cancelled, deleted, or taken over."""


class JobLeases:
    """What one life of a service holds. Methods raise OverloadedError when the database cannot be used."""

    def __init__(self, jobs: JobDatabase, lease_s: float, service_id: str) -> None:
        """Args:
        jobs: the tables.
        lease_s: how long a job stays this service's without a word of it.
        service_id: names this life of the service.
        """
        self._jobs = jobs
        self._lease_s = lease_s
        self._service_id = service_id

    async def survey(self, held: Collection[str] = ()) -> list[OwnerJobs]:
        """Tenants with open jobs. Those that are `held` here are being read, whatever became of their leases."""
        is_free = and_(JOBS.c.lease_until_ns < time.time_ns(), JOBS.c.job_id.not_in(held))
        wanted = (
            select(
                JOBS.c.owner,
                func.count(),
                func.sum(case((is_free, 1), else_=0)),
                func.min(case((is_free, JOBS.c.created_ns))),
            )
            .where(JOBS.c.status.in_(OPEN))
            .group_by(JOBS.c.owner)
        )
        async with self._jobs.reading() as connection:
            rows = (await connection.execute(wanted)).all()
        return [OwnerJobs(owner, total - int(free), int(free), oldest or 0) for owner, total, free, oldest in rows]

    async def take(self, turns: JobTurns, held: Collection[str] = ()) -> JobRow | None:
        """A job that nobody reads, now this service's; None when there is none. Of the tenant whose turn it is the
        oldest one.

        Those that are `held` here stay what they are: when their lease has passed while this process stood still, and
        no other has taken them, the next write renews it.
        """
        for tenant in turns.rank(await self.survey(held))[:_MAX_CANDIDATES]:
            free = and_(JOBS.c.status.in_(OPEN), JOBS.c.lease_until_ns < time.time_ns(), JOBS.c.job_id.not_in(held))
            theirs = select(JOBS.c.job_id).where(and_(free, JOBS.c.owner == tenant.owner))
            async with self._jobs.reading() as connection:
                found = await connection.execute(theirs.order_by(JOBS.c.created_ns).limit(_MAX_CANDIDATES))
                candidates = found.scalars().all()
            for job_id in candidates:
                if await self._take(job_id, free):
                    turns.note(tenant.owner, time.monotonic())
                    return await self._jobs.find_one(JOBS.c.job_id == job_id)
        return None

    async def _take(self, job_id: str, free: ColumnElement[bool]) -> bool:
        """Of two services that have seen a job, one gets it."""
        values = {
            "status": RUNNING,
            "lease_owner": self._service_id,
            "lease_until_ns": self._lease_end(),
            "num_takes": JOBS.c.num_takes + 1,
            "started_ns": func.coalesce(func.nullif(JOBS.c.started_ns, 0), time.time_ns()),
        }
        async with self._jobs.writing() as connection:
            done = await connection.execute(update(JOBS).where(and_(JOBS.c.job_id == job_id, free)).values(values))
        return bool(done.rowcount)

    async def read_done(self, job_id: str) -> set[int]:
        """Pages of a job that are in the database."""
        async with self._jobs.reading() as connection:
            found = await connection.execute(select(JOB_PAGES.c.page).where(JOB_PAGES.c.job_id == job_id))
            return set(found.scalars())

    async def read_charged(self, job: JobRow) -> Mapping[int, int]:
        """What requests for pages of a job were charged so far, by page, in nanodollars, as far as the ledger is in
        the same database."""
        wanted = and_(
            REQUESTS.c.tenant_id == job.owner,
            REQUESTS.c.arrived_ns >= job.created_ns - round(_CLOCKS_S * NS),
            REQUESTS.c.request_id.startswith(f"{SERVICE_MARK}{job.job_id}-p", autoescape=True),
            REQUESTS.c.cost_nanodollars > 0,
        )
        async with self._jobs.reading() as connection:
            rows = await connection.execute(select(REQUESTS.c.request_id, REQUESTS.c.cost_nanodollars).where(wanted))
        charged: Counter[int] = Counter()
        for request_id, nanodollars in rows:
            page = find_page(job.job_id, request_id)
            if page is not None:
                charged[page] += nanodollars
        return charged

    async def renew(self, job_id: str) -> None:
        """Raises LeaseLostError when the job is no longer this service's."""
        async with self._jobs.writing() as connection:
            await self._update_own(connection, job_id, {"lease_until_ns": self._lease_end()})

    async def store_page(self, job_id: str, result: PageResult) -> None:
        """Put a page in and count it, both or neither.

        Raises:
            LeaseLostError: the job is no longer this service's.
        """
        used, text = result.usage, result.page.model_dump_json()
        changes = {
            "num_done": JOBS.c.num_done + 1,
            "num_failed": JOBS.c.num_failed + int(result.is_failed),
            "prompt_tokens": JOBS.c.prompt_tokens + used.prompt_tokens,
            "completion_tokens": JOBS.c.completion_tokens + used.completion_tokens,
            "image_tokens": JOBS.c.image_tokens + used.image_tokens,
            "cost_nanodollars": JOBS.c.cost_nanodollars + used.cost_nanodollars,
            "result_bytes": JOBS.c.result_bytes + len(text.encode()),
            "lease_until_ns": self._lease_end(),
        }
        async with self._jobs.writing() as connection:
            await self._update_own(connection, job_id, changes)
            count = select(JOBS.c.num_done).where(JOBS.c.job_id == job_id)
            row = {
                "job_id": job_id,
                "page": result.page.index,
                "seq": (await connection.execute(count)).scalar_one(),
                "is_failed": result.is_failed,
                "result": text,
                "finished_ns": time.time_ns(),
            }
            await connection.execute(insert(JOB_PAGES).values(row))

    async def finish(self, job_id: str, failure: PageFailure | None = None) -> None:
        """The job has ended; its key goes.

        Raises:
            LeaseLostError: it is no longer this service's.
        """
        changes = self._jobs.ended(FAILED if failure is not None else COMPLETED)
        changes["error"] = build_error(failure).model_dump_json() if failure is not None else ""
        async with self._jobs.writing() as connection:
            await self._update_own(connection, job_id, changes)

    async def leave(self, job_id: str, *, is_orderly: bool) -> None:
        """Give a job back before it has ended, so that it can be taken again at once.

        Args:
            job_id: of a job of this service's.
            is_orderly: whether every page that was begun has been stored. Then the turn does not count as a take, after
                which whoever takes the job again would have to ask what pages were charged.
        """
        changes = {"lease_until_ns": 0, "lease_owner": "", "num_takes": JOBS.c.num_takes - int(is_orderly)}
        with contextlib.suppress(LeaseLostError):
            async with self._jobs.writing() as connection:
                await self._update_own(connection, job_id, changes)

    def _lease_end(self) -> int:
        return time.time_ns() + round(self._lease_s * NS)

    async def _update_own(self, connection: AsyncConnection, job_id: str, changes: dict[str, Any]) -> None:
        ours = and_(JOBS.c.job_id == job_id, JOBS.c.status == RUNNING, JOBS.c.lease_owner == self._service_id)
        if not (await connection.execute(update(JOBS).where(ours).values(changes))).rowcount:
            raise LeaseLostError(job_id)
