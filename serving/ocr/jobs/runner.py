"""Reads jobs, each under its lease, in turns between tenants (`turns`).

When a service dies with pages in flight, the pages that were stored remain and are not requested again. The requests
for the others end with their connections: the router has the engines abort them and records them as aborted, with what
they had used by then; or their answers were complete but not stored yet. The service that takes the job over, after
`lease_s` at most, requests these pages again under the same request ids, and the router deducts what they were charged
before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.errors import InvalidRequestError, OverloadedError, ServingError, SettingsError
from serving.ocr.jobs.key_sealing import KeySealer
from serving.ocr.jobs.leases import JobLeases, LeaseLostError
from serving.ocr.jobs.model import JobRow
from serving.ocr.jobs.sweeper import JobSweeper
from serving.ocr.jobs.turns import HeldJob, JobTurns
from serving.ocr.reading.documents import PageEnded, Pipeline, is_for_all
from serving.ocr.reading.options import read_options
from serving.ocr.reading.pages import PageFailure
from serving.ocr.reading.request import ReadRequest, choose_prompt
from serving.ocr.reading.results import as_failure
from serving.ocr.rendering.formats import DocumentFormat
from serving.ocr.rendering.pool import Effort, OpenedDocument
from serving.settings.ocr import OcrSettings

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_MAX_TAKES = 20
"""A job that was taken over this often without any page being stored fails: it may be crashing the services."""

_MAX_LEFT = 1000
"""How many jobs' rendering costs are remembered between their turns."""


@dataclass(slots=True)
class _RunningJob:
    """A job that this process is reading."""

    owner: str
    since_s: float
    num_done: int = 0
    """Pages stored in this turn."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """When set, no further page is started, and the job waits for another turn."""
    task: asyncio.Task[None] = field(init=False)


class JobRunner:
    """One per process. Use it inside one event loop."""

    def __init__(
        self,
        leases: JobLeases,
        sweeper: JobSweeper,
        pipeline: Pipeline,
        key_sealer: KeySealer,
        settings: OcrSettings,
    ) -> None:
        self._leases = leases
        self._sweeper = sweeper
        self._pipeline = pipeline
        self._key_sealer = key_sealer
        self._settings = settings
        self._wake = asyncio.Event()
        self._turns = JobTurns(settings.jobs.turn_s)
        self._reading: dict[str, _RunningJob] = {}
        self._efforts: OrderedDict[str, Effort] = OrderedDict()
        """Rendering costs of jobs between their turns, so that turns do not raise a document's limit."""
        self._tasks: list[asyncio.Task[None]] = []
        self.counts: dict[str, int] = {}
        """Number of jobs by status, at the last poll."""
        self.lag_s = 0.0
        """Age of the oldest queued job in seconds, at the last poll."""

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._take_forever()), asyncio.create_task(self._sweeper.sweep_forever())]

    def stop_taking(self) -> None:
        """Start no further job and no further page."""
        for reading in self._reading.values():
            reading.stop.set()
        for task in self._tasks:
            task.cancel()

    async def close(self, drain_s: float) -> None:
        """Stop; pages in flight have `drain_s` to finish. Unfinished jobs are left to other services."""
        self.stop_taking()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        tasks = [reading.task for reading in self._reading.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_reading(self) -> int:
        """Number of jobs that this process is reading."""
        return len(self._reading)

    @property
    def is_well(self) -> bool:
        return not any(task.done() for task in self._tasks)

    def find_file(self, job_id: str) -> Path:
        """The path of a job's document."""
        return self._sweeper.storage.documents / job_id

    def wake(self) -> None:
        """Look for jobs now: there is a new one."""
        self._wake.set()

    def abandon(self, job_id: str) -> None:
        """Stop reading a job that was cancelled or deleted."""
        reading = self._reading.get(job_id)
        if reading is not None:
            reading.task.cancel()

    async def remove_file(self, job_id: str) -> None:
        await self._sweeper.storage.remove(self.find_file(job_id))

    async def _take_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._fill_places()
                await self._make_room()
                self.counts, self.lag_s = await self._sweeper.count_states()
            except ServingError as error:
                logger.warning("cannot look for jobs: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._settings.jobs.poll_s)

    async def _fill_places(self) -> None:
        while len(self._reading) < self._settings.jobs.running:
            job = await self._leases.take(self._turns, list(self._reading))
            if job is None:
                return
            self._reading[job.job_id] = reading = _RunningJob(job.owner, time.monotonic())
            reading.task = asyncio.create_task(self._read_to_end(job, reading.stop))

    async def _make_room(self) -> None:
        """Ask jobs to yield their slots, after the current page, to tenants that wait for one."""
        if len(self._reading) < self._settings.jobs.running:
            return
        held = [
            HeldJob(job_id, each.owner, each.since_s, can_leave=each.num_done > 0, is_leaving=each.stop.is_set())
            for job_id, each in self._reading.items()
        ]
        tenants = await self._leases.survey([job.job_id for job in held])
        for job_id in self._turns.choose_leaving(held, tenants, time.monotonic()):
            if job_id in self._reading:
                self._reading[job_id].stop.set()

    async def _read_to_end(self, job: JobRow, stop: asyncio.Event) -> None:
        """Read a job until it has ended, its lease is lost, or it yields its slot."""
        reading = asyncio.create_task(self._read(job, stop))
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=self._settings.jobs.lease_s / 3)
                if not reading.done():
                    await self._persist(self._leases.renew, job.job_id)
            failure = reading.result()
            if stop.is_set() and failure is None and await self._count_left(job):
                await self._leases.leave(job.job_id, is_orderly=True)
                logger.info("job waits for its next turn", extra={"job": job.job_id, "owner": job.owner})
            else:
                await self._persist(self._leases.finish, job.job_id, failure)
                if not self._settings.jobs.keep_documents_s:
                    await self.remove_file(job.job_id)
                error = failure and failure.code
                logger.info("job read", extra={"job": job.job_id, "owner": job.owner, "error": error})
        except LeaseLostError:
            logger.info("job was cancelled, deleted or taken over by another service", extra={"job": job.job_id})
        except asyncio.CancelledError:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            with contextlib.suppress(ServingError):
                await self._leases.leave(job.job_id, is_orderly=False)
            raise
        except Exception:
            logger.exception("job %s cannot be read; it is retried when its lease has expired", job.job_id)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._reading.pop(job.job_id, None)
            self._wake.set()

    async def _count_left(self, job: JobRow) -> int:
        return len(set(job.pages) - await self._leases.read_done(job.job_id))

    async def _read(self, job: JobRow, stop: asyncio.Event) -> PageFailure | None:
        """Read the pages of a job that are still missing; returns the failure that ended the whole job, if any.

        Raises:
            LeaseLostError: this service no longer has the lease.
        """
        if job.num_takes > _MAX_TAKES + job.num_done:
            return PageFailure("job_given_up", "The service stopped too often while it read this job.")
        try:
            secrets = self._key_sealer.open(job.sealed_key)
            options = read_options(job.options)
        except SettingsError as error:
            logger.error("job %s: %s", job.job_id, error)
            message = "The service's secret has changed since this job was submitted; submit it again."
            return PageFailure("key_unreadable", message)
        except InvalidRequestError as error:  # submitted to a version with other options
            return as_failure(error)
        document = self._find_document(job, secrets.password)
        if not await asyncio.to_thread(document.file.exists):
            return PageFailure("document_missing", "The job's document no longer exists; submit it again.")
        charged = await self._find_charged(job)
        done = await self._leases.read_done(job.job_id)
        request = ReadRequest(
            document=document,
            pages=[page for page in job.pages if page not in done],
            options=options,
            prompt=choose_prompt(options, self._settings),
            request_id=job.job_id,
            api_key=secrets.api_key,
            charged=charged,
            stop=stop,
        )
        failure = await self._read_pages(job, request)
        if stop.is_set():
            self._efforts[job.job_id] = document.effort
            while len(self._efforts) > _MAX_LEFT:
                self._efforts.popitem(last=False)
        return failure

    def _find_document(self, job: JobRow, password: str | None) -> OpenedDocument:
        """The document as it was opened when the job was submitted."""
        effort = self._efforts.pop(job.job_id, None) or Effort()
        facts = job.document
        kind, num_pages = DocumentFormat(facts.format or ""), facts.num_pages or 0
        return OpenedDocument(self.find_file(job.job_id), kind, num_pages, job.owner, password, effort)

    async def _find_charged(self, job: JobRow) -> Mapping[int, int]:
        """What pages were charged while another service held the job: nanodollars by page index."""
        if job.num_takes == 1:
            return {}
        await asyncio.sleep(self._settings.jobs.settle_s)
        return await self._leases.read_charged(job)

    async def _read_pages(self, job: JobRow, request: ReadRequest) -> PageFailure | None:
        if not request.pages:
            return None
        async with contextlib.aclosing(self._pipeline.read(request)) as events:
            async for event in events:
                if not isinstance(event, PageEnded):
                    continue
                if is_for_all(event.result.failure):
                    return event.result.failure
                await self._persist(self._leases.store_page, job.job_id, event.result)
                self._pipeline.count(event)
                self._note_page(job.job_id)
        return None

    def _note_page(self, job_id: str) -> None:
        """Count a stored page. A tenant that waits for a slot may have waited for this job's first page."""
        reading = self._reading.get(job_id)
        if reading is not None:
            reading.num_done += 1
            if reading.num_done == 1:
                self._wake.set()

    async def _persist(self, write: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Retry a write until the database is available: the page has been paid for."""
        while True:
            try:
                await write(*arguments)
                return
            except OverloadedError as error:
                logger.warning("cannot write a job's state, retrying: %s", error)
                await asyncio.sleep(_RETRY_S)
