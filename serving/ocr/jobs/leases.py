"""Jobs from the point of view of the services that read them: each is held under a lease, which guards every write.

`store_page` inserts a page and counts it in one transaction, which changes nothing when another service has the lease
or the job was cancelled or deleted. A page therefore counts once, whichever services have read it.
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
"""How far a router's clock may be behind a service's."""

_MAX_CANDIDATES = 8
"""How many tenants, and how many jobs of each, one poll tries."""


class LeaseLostError(Exception):
    """The job was cancelled, deleted or taken over by another service."""


class JobLeases:
    """The leases of one service process. Methods raise OverloadedError when the database is unavailable."""

    def __init__(self, jobs: JobDatabase, lease_s: float, service_id: str) -> None:
        """No lease is held yet.

        Args:
            jobs: the job tables.
            lease_s: how long a lease is valid without renewal, in seconds.
            service_id: identifies this process; a restarted service has another one.
        """
        self._jobs = jobs
        self._lease_s = lease_s
        self._service_id = service_id

    async def survey(self, held: Collection[str] = ()) -> list[OwnerJobs]:
        """Tenants with open jobs. Jobs in `held` count as running even when their leases have expired."""
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
        """Lease the oldest free job of the tenant whose turn it is; None when no job is free.

        Jobs in `held` are left alone: if their leases expired while this process was suspended and no other service
        has taken them, the next write renews the lease.
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
        """Try to lease a job; of several services that try, one succeeds."""
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
        """Indices of a job's pages that are stored."""
        async with self._jobs.reading() as connection:
            found = await connection.execute(select(JOB_PAGES.c.page).where(JOB_PAGES.c.job_id == job_id))
            return set(found.scalars())

    async def read_charged(self, job: JobRow) -> Mapping[int, int]:
        """What requests for a job's pages were charged so far: nanodollars by page index.

        Only known when the ledger is in the same database.
        """
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
        """Extend a lease; raises LeaseLostError when this service no longer has it."""
        async with self._jobs.writing() as connection:
            await self._update_own(connection, job_id, {"lease_until_ns": self._lease_end()})

    async def store_page(self, job_id: str, result: PageResult) -> None:
        """Insert a page and count it in one transaction.

        Raises:
            LeaseLostError: this service no longer has the lease.
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
        """Mark a job as completed, or as failed, and delete its API key.

        Raises:
            LeaseLostError: this service no longer has the lease.
        """
        changes = self._jobs.ended(FAILED if failure is not None else COMPLETED)
        changes["error"] = build_error(failure).model_dump_json() if failure is not None else ""
        async with self._jobs.writing() as connection:
            await self._update_own(connection, job_id, changes)

    async def leave(self, job_id: str, *, is_orderly: bool) -> None:
        """Release a lease before the job has ended, so that the job can be leased again immediately.

        Args:
            job_id: a job that this service holds.
            is_orderly: whether every page that was started has been stored. Then this turn is not counted in
                `num_takes`, and the next service need not look up what pages were charged.
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
