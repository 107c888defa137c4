"""Reads many files through jobs of the OCR service into a folder, and resumes where an earlier run stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from serving.ocr_api.page_ranges import select_pages
from serving.ocr_api.shapes import JobStatus, OcrJob, OcrPage
from serving.ocr_client.bulk_results import OutputFormat, ResultFacts, render
from serving.ocr_client.bulk_state import BulkState, FileState, describe_options, digest_file, join_ranges
from serving.ocr_client.client import AsyncOcrClient, ReadOptions
from serving.ocr_client.errors import (
    BusyError,
    KeyRefusedError,
    NotFoundError,
    OcrError,
    QuotaError,
    RequestRefusedError,
    ServiceError,
)
from serving.ocr_client.file_names import show_name
from serving.ocr_client.file_search import Task

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_LEAST_FREE_BYTES = 32 * 2**20
"""Free space of the results' disk below which no further document is sent."""
_FIRST_POLL_S, _LAST_POLL_S = 0.25, 2.0
_MAX_JOBS_LOST = 3
"""Jobs of one file that may be lost in one run before the run gives up."""


class DiskFullError(Exception):
    """There is no space for further results, so no further page is paid for."""


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """The outcome of one file."""

    task: Task
    num_read: int = 0
    """Pages that were read, by this run or earlier ones."""
    failed: dict[int, str] = field(default_factory=dict)
    """Reasons of failed pages, by page number."""
    failure: str | None = None
    """Why the document as a whole could not be read."""
    was_done: bool = False
    """Whether earlier runs had already read all of it."""
    digest: str = ""
    """SHA-256 of the file; empty if it could not be read."""
    seconds: float = 0.0
    modes: tuple[str, ...] = ()
    """Resolution modes of its pages, without duplicates."""
    num_tokens: int = 0
    """Prompt and completion tokens of its pages, whichever run read them."""
    dollars: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.failure is None and not self.failed


@dataclass(slots=True)
class Tally:
    """Progress of this run so far."""

    num_pages: int = 0
    """Pages of the files that were started, as far as known."""
    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    """Completion tokens."""
    dollars: float = 0.0

    def add(self, pages: Iterable[OcrPage]) -> None:
        for page in pages:
            self.num_done += 1
            self.num_failed += not page.is_completed
            self.num_tokens += page.usage.completion_tokens
            self.dollars += page.usage.estimated_cost


class BulkRun:
    """Reads files through the service, several at a time."""

    def __init__(
        self,
        client: AsyncOcrClient,
        state: BulkState,
        options: ReadOptions,
        kind: OutputFormat,
        on_change: Callable[[Tally], None] = lambda tally: None,
        on_outcome: Callable[[FileOutcome], None] = lambda outcome: None,
        revision: str | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            client: its retries should outlast a restart of the service.
            state: of the folder for the results.
            options: for every file; `format` is overridden according to `kind`.
            kind: format of the result files.
            on_change: called whenever pages have arrived.
            on_outcome: called at the end of every file.
            revision: of the model's checkpoint, for the results; None if the service does not tell it.
        """
        self._options = replace(options, format=kind.page_format)
        self._client, self._state, self._kind = client, state, kind
        self._on_change, self._on_outcome = on_change, on_outcome
        self._revision = revision
        fields = self._options.fields()
        fields.pop("password", None)  # nothing that is stored says it
        self._described = describe_options(fields)
        self.tally = Tally()

    async def run(self, tasks: Sequence[Task], num_at_once: int) -> list[FileOutcome]:
        """Read all files and return their outcomes in order.

        Raises:
            OcrError: the service cannot be used. What was read is kept.
            DiskFullError: there is no space for results. What was read is kept.
        """
        await self._cancel_left_jobs({task.key for task in tasks})
        outcomes: list[FileOutcome | None] = [None] * len(tasks)
        waiting = iter(enumerate(tasks))

        async def work() -> None:
            for index, task in waiting:
                outcomes[index] = outcome = await self._do(task)
                self._on_outcome(outcome)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(num_at_once, len(tasks))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors  # they all have the same cause: the service, or the disk
        return [outcome for outcome in outcomes if outcome is not None]

    async def _cancel_left_jobs(self, paths: Collection[str]) -> None:
        """End the jobs of files that an earlier run was stopped in and this one does not read."""
        for path, options, job_id in self._state.find_left_jobs(paths):
            await self._cancel(job_id)
            self._begin_again(path, json.loads(options).get("pages"))

    async def _cancel(self, job_id: str) -> None:
        with contextlib.suppress(RequestRefusedError):  # it has expired, or was another key's
            await self._client.delete(job_id)

    async def _do(self, task: Task) -> FileOutcome:
        began_s = time.monotonic()
        try:
            with _watching_disk():
                outcome = await self._read(task)
        except (KeyRefusedError, QuotaError, BusyError, ServiceError, NotFoundError):
            raise
        except RequestRefusedError as error:
            outcome = FileOutcome(task, failure=str(error))
        except _ResultError as error:
            outcome = FileOutcome(task, failure=f"its result cannot be written ({error})")
        except OSError as error:
            outcome = FileOutcome(task, failure=f"it cannot be read ({error.strerror})")
        return replace(outcome, seconds=time.monotonic() - began_s)

    async def _read(self, task: Task) -> FileOutcome:
        path = task.key
        digest = await asyncio.to_thread(digest_file, task.file)
        stale = self._state.find_stale_job(path, digest, self._described)
        if stale is not None:
            await self._cancel(stale)
        file = self._state.open_file(path, digest, self._described)
        failed = self._state.numbers(path, is_completed=False)
        if file.is_over and not failed:
            if not task.target.exists():
                self._write(task)
            return replace(self._conclude(task, None), was_done=True)
        if file.is_over:
            self._state.begin_again(path, join_ranges(failed))
        return self._conclude(task, await self._follow(task))

    async def _follow(self, task: Task) -> str | None:
        """Submit the file unless that was done before, and fetch its pages; returns why the job failed, if it did."""
        path, num_lost = task.key, 0
        while True:
            job_id = await self._find_job(task)
            try:
                job = await self._take_pages(path, job_id)
            except NotFoundError:
                num_lost += 1
                if num_lost > _MAX_JOBS_LOST:
                    raise
                # The job has expired or was lost: only missing pages are read again.
                self._begin_again(path, self._options.pages)
                continue
            break
        if job.status != JobStatus.COMPLETED:
            self._begin_again(path, self._options.pages)
            return job.error.message if job.error is not None else f"its job was {job.status.value}"
        self._write(task)
        self._state.finish(path)
        with contextlib.suppress(OcrError):  # otherwise it expires
            await self._client.delete(job_id)
        return None

    async def _find_job(self, task: Task) -> str:
        path = task.key
        file = self._state.find(path)
        if file.job is not None:
            return file.job
        if shutil.disk_usage(self._state.folder).free < _LEAST_FREE_BYTES:
            raise DiskFullError
        options = self._options if file.chosen is None else replace(self._options, pages=file.chosen, page_base=1)
        # The key is stored before it is sent: a run that is killed here submits again and gets the same job.
        job = await self._client.submit(task.file, options, idempotency_key=file.submission)
        self._state.begin_job(path, job.id)
        return job.id

    async def _take_pages(self, path: str, job_id: str) -> OcrJob:
        """Fetch pages as they finish until the job is over, and return the job."""
        file = self._state.find(path)
        after, poll_s, num_known = file.after, _FIRST_POLL_S, 0
        while True:
            job = await self._client.job(job_id)
            if job.document is not None and job.document.num_pages and file.num_pages is None:
                self._state.count_pages(path, job.document.num_pages)
            if job.pages_total and not num_known:
                num_known = job.pages_total
                self.tally.num_pages += num_known - file.after
            has_more, num_new = True, 0
            while has_more:
                pages = await self._client.job_pages(job_id, after=after)
                after = max((page.seq for page in pages.data if page.seq is not None), default=after)
                self._state.add_pages(path, pages.data, after)
                self.tally.add(pages.data)
                num_new += len(pages.data)
                has_more = pages.has_more and bool(pages.data)
            self._on_change(self.tally)
            if job.status.is_over:
                return job
            poll_s = _FIRST_POLL_S if num_new else min(poll_s * 1.5, _LAST_POLL_S)
            await asyncio.sleep(poll_s)

    def _begin_again(self, path: str, pages: str | None) -> None:
        file = self._state.find(path)
        self._state.begin_again(path, self._choose_missing(path, file, pages))

    def _choose_missing(self, path: str, file: FileState, pages: str | None) -> str | None:
        """Pages that have not been read yet, as a selection; None for all that were asked for."""
        if file.num_pages is None:
            return None
        options = self._options
        wanted = [index + 1 for index in select_pages(pages, file.num_pages, file.num_pages, options.page_base)]
        done = set(self._state.numbers(path, is_completed=True))
        return join_ranges([number for number in wanted if number not in done]) or None

    def _conclude(self, task: Task, failure: str | None) -> FileOutcome:
        pages, file = self._state.pages(task.key), self._state.find(task.key)
        failed = {p.number: p.error.message if p.error is not None else "" for p in pages if not p.is_completed}
        return FileOutcome(
            task,
            len(pages) - len(failed),
            failed,
            failure,
            digest=file.digest,
            modes=tuple(dict.fromkeys(page.mode for page in pages if page.mode is not None)),
            num_tokens=sum(page.usage.prompt_tokens + page.usage.completion_tokens for page in pages),
            dollars=sum(page.usage.estimated_cost for page in pages),
        )

    def _write(self, task: Task) -> None:
        """Write the result of a file.

        Raises:
            DiskFullError: the disk is full.
            _ResultError: the result's path cannot be used.
        """
        file = self._state.find(task.key)
        facts = ResultFacts(show_name(task.file), file.num_pages, self._options.model, self._revision, file.digest)
        content = render(self._kind, facts, self._state.pages(task.key))
        half = task.target.with_name(f".{task.target.name}.half")
        try:
            task.target.parent.mkdir(parents=True, exist_ok=True)
            half.write_bytes(content)
            os.replace(half, task.target)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            raise _ResultError(f"{show_name(task.target)}: {error.strerror}") from error


class _ResultError(Exception):
    """The path of a result cannot be used, for example because a file stands where a folder has to be."""


@contextlib.contextmanager
def _watching_disk() -> Iterator[None]:
    """Turn the ways in which a full disk shows into DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DiskFullError from error
        raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise DiskFullError from error
        raise
