"""Reads jobs, each under its lease, by turns between their tenants (`job_turns`).

What happens when a service dies with pages in flight: pages whose answers were stored stay, and are not asked for
again. The requests of the others end with their connections: the router has the engines abort them and records them as
aborted, with what they had used by then; or their answers were whole and only not stored yet. Whoever takes the job
over, after `lease_s` at most, asks for these pages again, under the same request ids, and has the router take off what
they were charged before.
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
"""A job that has ended so many services without a page to show for it is not tried again."""

_MAX_LEFT = 1000
"""Jobs left for another turn of which is remembered what they have cost."""


@dataclass(slots=True)
class _RunningJob:
    """A job that is being read."""

    owner: str
    since_s: float
    num_done: int = 0
    """Pages stored in this turn."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, no further page is begun, and the job is left for another turn."""
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
        """Of jobs that were left for another turn: a document does not get more time for being read in turns."""
        self._tasks: list[asyncio.Task[None]] = []
        self.counts: dict[str, int] = {}
        """Jobs by status, as the database had them a moment ago."""
        self.lag_s = 0.0
        """How long the oldest queued job has waited."""

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._take_forever()), asyncio.create_task(self._sweeper.sweep_forever())]

    def stop_taking(self) -> None:
        """No job and no page is begun any more."""
        for reading in self._reading.values():
            reading.stop.set()
        for task in self._tasks:
            task.cancel()

    async def close(self, drain_s: float) -> None:
        """Take no more; pages under way have `drain_s`. Jobs that have not ended are left for others."""
        self.stop_taking()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        tasks = [reading.task for reading in self._reading.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def is_well(self) -> bool:
        return not any(task.done() for task in self._tasks)

    def find_file(self, job_id: str) -> Path:
        """Where a job's document is."""
        return self._sweeper.storage.documents / job_id

    def wake(self) -> None:
        """There is a new job."""
        self._wake.set()

    def abandon(self, job_id: str) -> None:
        """A job was cancelled or deleted: end what is under way for it here."""
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
                logger.warning("jobs cannot be looked for: %s", error)
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
        """Have jobs give their places up for tenants that wait: at their next page, or later by the next call."""
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
        """One job, until it has ended, is no longer ours, or gives its place up."""
        reading = asyncio.create_task(self._read(job, stop))
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=self._settings.jobs.lease_s / 3)
                if not reading.done():
                    await self._persist(self._leases.renew, job.job_id)
            failure = reading.result()
            if stop.is_set() and failure is None and await self._count_left(job):
                await self._leases.leave(job.job_id, is_orderly=True)
                logger.info("job left for its next turn", extra={"job": job.job_id, "owner": job.owner})
            else:
                await self._persist(self._leases.finish, job.job_id, failure)
                if not self._settings.jobs.keep_documents_s:
                    await self.remove_file(job.job_id)
                error = failure and failure.code
                logger.info("job read", extra={"job": job.job_id, "owner": job.owner, "error": error})
        except LeaseLostError:
            logger.info("job lost to another service, cancelled or deleted", extra={"job": job.job_id})
        except asyncio.CancelledError:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            with contextlib.suppress(ServingError):
                await self._leases.leave(job.job_id, is_orderly=False)
            raise
        except Exception:
            logger.exception("job %s cannot be read; it is tried again after its lease", job.job_id)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._reading.pop(job.job_id, None)
            self._wake.set()

    async def _count_left(self, job: JobRow) -> int:
        return len(set(job.pages) - await self._leases.read_done(job.job_id))

    async def _read(self, job: JobRow, stop: asyncio.Event) -> PageFailure | None:
        """Read what is left of a job; gives the failure that ended all of it.

        Raises:
            LeaseLostError: it is no longer ours.
        """
        if job.num_takes > _MAX_TAKES + job.num_done:
            return PageFailure("job_given_up", "Services that read this job have ended too often.")
        try:
            api_key = self._key_sealer.open(job.sealed_key)
            options = read_options(job.options)
        except SettingsError as error:
            logger.error("job %s: %s", job.job_id, error)
            return PageFailure("key_unreadable", "The service's secret has changed since this job was made.")
        except InvalidRequestError as error:  # a version with other options took it in
            return as_failure(error)
        document = self._find_document(job)
        if not await asyncio.to_thread(document.file.exists):
            return PageFailure("document_missing", "The job's document is no longer there.")
        charged = await self._find_charged(job)
        done = await self._leases.read_done(job.job_id)
        request = ReadRequest(
            document=document,
            pages=[page for page in job.pages if page not in done],
            options=options,
            prompt=choose_prompt(options, self._settings),
            request_id=job.job_id,
            api_key=api_key,
            charged=charged,
            stop=stop,
        )
        failure = await self._read_pages(job, request)
        if stop.is_set():
            self._efforts[job.job_id] = document.effort
            while len(self._efforts) > _MAX_LEFT:
                self._efforts.popitem(last=False)
        return failure

    def _find_document(self, job: JobRow) -> OpenedDocument:
        """The document as it was opened when the job was submitted."""
        effort = self._efforts.pop(job.job_id, None) or Effort()
        facts = job.document
        return OpenedDocument(
            self.find_file(job.job_id), DocumentFormat(facts.format or ""), facts.num_pages or 0, job.owner, effort
        )

    async def _find_charged(self, job: JobRow) -> Mapping[int, int]:
        """What pages were charged while another service had the job, in nanodollars."""
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
        """Who waits for a place may have waited for a page of this job."""
        reading = self._reading.get(job_id)
        if reading is not None:
            reading.num_done += 1
            if reading.num_done == 1:
                self._wake.set()

    async def _persist(self, write: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Write it, however long the database is away: what was read has been paid for."""
        while True:
            try:
                await write(*arguments)
                return
            except OverloadedError as error:
                logger.warning("a job's state cannot be written, trying again: %s", error)
                await asyncio.sleep(_RETRY_S)
