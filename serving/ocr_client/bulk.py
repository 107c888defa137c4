"""Reads many files through jobs of the OCR service into a folder, and resumes where an earlier run stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from serving.ocr_api.page_ranges import select_pages
from serving.ocr_api.shapes import JobStatus, OcrJob, OcrPage
from serving.ocr_client.bulk_state import BulkState, FileState, describe_options, digest_file, join_ranges
from serving.ocr_client.client import AsyncOcrClient, PageFormat, ReadOptions
from serving.ocr_client.errors import (
    BusyError,
    KeyRefusedError,
    NotFoundError,
    OcrError,
    QuotaError,
    RequestRefusedError,
    ServiceError,
)
from serving.ocr_client.file_names import name_key, safe_place, show_name

SUFFIXES = frozenset((".pdf", ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp"))
"""Suffixes of files that are taken from folders. A file that is named is sent whatever its suffix."""
_FIRST_POLL_S, _LAST_POLL_S = 0.25, 2.0
_MAX_JOBS_LOST = 3
"""Jobs of one file that may be lost in one run before the run gives up."""


class OutputFormat(StrEnum):
    MARKDOWN = "markdown"
    TEXT = "text"
    JSON = "json"

    @property
    def suffix(self) -> str:
        return {"markdown": ".md", "text": ".txt", "json": ".json"}[self.value]

    @property
    def page_format(self) -> PageFormat:
        """The format of pages that the file is made from."""
        formats: dict[str, PageFormat] = {"markdown": "markdown", "text": "text", "json": "layout"}
        return formats[self.value]


class FileSelectionError(Exception):
    """Files that cannot be read; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Task:
    file: Path
    target: Path
    """The file that its result is written to."""


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


@dataclass(frozen=True, slots=True)
class Found:
    files: list[tuple[Path, Path]]
    """Each file with its path relative to the folder that was named."""
    unread: dict[Path, str]
    """Folders that could not be searched, with the reason."""


def find_files(arguments: Sequence[str], out: Path) -> Found:
    """Expand arguments into files, without duplicates.

    Args:
        arguments: files, folders (searched recursively) and glob patterns.
        out: the folder for the results, which is not searched.

    Raises:
        FileSelectionError: a file does not exist, or a folder or pattern has no documents.
    """
    found: dict[Path, Path] = {}
    unread: dict[Path, str] = {}
    for argument in arguments:
        path = Path(argument)
        if os.path.isdir(path):
            inside, failed = _search(path, out)
            if not inside and not failed:
                raise FileSelectionError(
                    f"{show_name(argument)}: no documents in this folder ({', '.join(sorted(SUFFIXES))})"
                )
            found |= {file: file.relative_to(path) for file in inside}
            unread |= failed
        elif os.path.exists(path):
            found[path] = Path(path.name)
        else:
            matches = [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
            failed = _find_closed(argument)
            if not matches and not failed:
                raise FileSelectionError(
                    f"{show_name(argument)}: no such file or folder, and no file matches it as a pattern"
                )
            found |= {file: Path(file.name) for file in matches if file.is_file()}
            unread |= failed
    unique = {file.resolve(): (file, place) for file, place in reversed(found.items())}
    return Found(list(reversed(unique.values())), unread)


def _search(folder: Path, out: Path) -> tuple[list[Path], dict[Path, str]]:
    """Documents in a folder and its subfolders, and folders that could not be searched."""
    files: list[Path] = []
    failed: dict[Path, str] = {}
    results = out.resolve()

    def note(error: OSError) -> None:
        failed[Path(error.filename)] = error.strerror or "unreadable"

    for where, folders, names in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(where, name)
            if name.startswith(".") or file.suffix.lower() not in SUFFIXES:
                continue
            try:
                if file.is_file() and not file.resolve().is_relative_to(results):
                    files.append(file)
            except OSError as error:
                failed[file] = error.strerror or "unreadable"
    return sorted(files), failed


def _find_closed(pattern: str) -> dict[Path, str]:
    """Folders on a pattern's way that cannot be listed; `glob` skips them silently."""
    folders = Path(pattern).parts[:-1]
    prefixes = (str(Path(*folders[:count])) for count in range(1, len(folders) + 1))
    reached = {Path(name) for prefix in prefixes for name in glob.glob(prefix, recursive=True)}
    closed = (path for path in sorted(reached) if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK))
    return {path: os.strerror(errno.EACCES) for path in closed}


def plan_tasks(files: Sequence[tuple[Path, Path]], out: Path, kind: OutputFormat) -> list[Task]:
    """Name the results: `a.pdf` becomes `a.md`, or `a.pdf.md` if there is an `a.png` too.

    Raises:
        FileSelectionError: two results would have the same name.
    """
    stems = [place.with_suffix("") for _, place in files]
    counts = Counter(stems)
    tasks = []
    targets: dict[Path, Path] = {}
    for (file, place), stem in zip(files, stems, strict=True):
        name = safe_place(place if counts[stem] > 1 else stem)
        target = out / name.with_name(name.name + kind.suffix)
        if target in targets:
            names = map(show_name, (file, targets[target], target))
            raise FileSelectionError(
                "{} and {} would both become {}; use separate folders for their results".format(*names)
            )
        targets[target] = file
        tasks.append(Task(file, target))
    return tasks


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
    ) -> None:
        """Nothing is sent yet.

        Args:
            client: its retries should outlast a restart of the service.
            state: of the folder for the results.
            options: for every file; `format` is overridden according to `kind`.
            kind: format of the result files.
            on_change: called whenever pages have arrived.
            on_outcome: called at the end of every file.
        """
        self._options = replace(options, format=kind.page_format)
        self._client, self._state, self._kind = client, state, kind
        self._on_change, self._on_outcome = on_change, on_outcome
        self.tally = Tally()

    async def run(self, tasks: Sequence[Task], num_at_once: int) -> list[FileOutcome]:
        """Read all files and return their outcomes in order.

        Raises:
            OcrError: the service cannot be used. What was read is kept.
        """
        room = asyncio.Semaphore(num_at_once)

        async def do(task: Task) -> FileOutcome:
            async with room:
                outcome = await self._do(task)
            self._on_outcome(outcome)
            return outcome

        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(do(task)) for task in tasks]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors  # they all have the same cause: the service
        return [task.result() for task in running]

    async def _do(self, task: Task) -> FileOutcome:
        path = name_key(task.file.resolve())
        try:
            digest = await asyncio.to_thread(digest_file, task.file)
        except OSError as error:
            return FileOutcome(task, failure=f"it cannot be read ({error.strerror})")
        file = self._state.open_file(path, digest, describe_options(self._options.fields()))
        failed = self._state.numbers(path, is_completed=False)
        if file.is_over and not failed:
            if not task.target.exists():
                self._write(task, path)
            return replace(self._conclude(task, path, None), was_done=True)
        if file.is_over:
            self._state.begin_again(path, join_ranges(failed))
        try:
            failure = await self._follow(task, path)
        except (KeyRefusedError, QuotaError, BusyError, ServiceError, NotFoundError):
            raise
        except RequestRefusedError as error:
            return FileOutcome(task, failure=str(error))
        except OSError as error:
            return FileOutcome(task, failure=f"it cannot be read ({error.strerror})")
        return self._conclude(task, path, failure)

    async def _follow(self, task: Task, path: str) -> str | None:
        """Submit the file unless that was done before, and fetch its pages; returns why the job failed, if it did."""
        num_lost = 0
        while True:
            job_id = await self._find_job(task, path)
            try:
                job = await self._take_pages(path, job_id)
            except NotFoundError:
                num_lost += 1
                if num_lost > _MAX_JOBS_LOST:
                    raise
                # The job has expired or was lost: only missing pages are read again.
                self._begin_again(path)
                continue
            break
        if job.status != JobStatus.COMPLETED:
            self._begin_again(path)
            return job.error.message if job.error is not None else f"its job was {job.status.value}"
        self._write(task, path)
        self._state.finish(path)
        with contextlib.suppress(OcrError):  # otherwise it expires
            await self._client.delete(job_id)
        return None

    async def _find_job(self, task: Task, path: str) -> str:
        file = self._state.find(path)
        if file.job is not None:
            return file.job
        options = self._options if file.chosen is None else replace(self._options, pages=file.chosen)
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

    def _begin_again(self, path: str) -> None:
        file = self._state.find(path)
        self._state.begin_again(path, self._choose_missing(path, file))

    def _choose_missing(self, path: str, file: FileState) -> str | None:
        """Pages that have not been read yet, as a selection; None for all that were asked for."""
        if file.num_pages is None:
            return None
        wanted = [index + 1 for index in select_pages(self._options.pages, file.num_pages, file.num_pages)]
        done = set(self._state.numbers(path, is_completed=True))
        return join_ranges([number for number in wanted if number not in done]) or None

    def _conclude(self, task: Task, path: str, failure: str | None) -> FileOutcome:
        pages = self._state.pages(path)
        failed = {p.number: p.error.message if p.error is not None else "" for p in pages if not p.is_completed}
        return FileOutcome(task, len(pages) - len(failed), failed, failure)

    def _write(self, task: Task, path: str) -> None:
        task.target.parent.mkdir(parents=True, exist_ok=True)
        half = task.target.with_name(f".{task.target.name}.half")
        half.write_text(render(self._kind, task.file, self._state.pages(path)), encoding="utf-8")
        os.replace(half, task.target)


def render(kind: OutputFormat, file: Path, pages: Sequence[OcrPage]) -> str:
    """The content of a result file. Text pages are separated by form feeds, as in pdftotext; markdown by comments."""
    if kind is OutputFormat.JSON:
        listed = [page.model_dump(mode="json", exclude={"seq"}, exclude_none=True) for page in pages]
        dollars = round(sum(page.usage.estimated_cost for page in pages), 9)
        return json.dumps({"file": show_name(file.name), "estimated_cost": dollars, "pages": listed}, indent=1) + "\n"
    if kind is OutputFormat.TEXT:
        return "\f".join(f"{page.content}\n" for page in pages)
    parts = []
    for page in pages:
        if not page.is_completed:
            reason = (page.error.message if page.error is not None else "").replace("--", "- -")
            parts.append(f"<!-- page {page.number} could not be read: {reason} -->\n")
        else:
            head = f"<!-- page {page.number} -->\n\n" if len(pages) > 1 else ""
            parts.append(f"{head}{page.content}\n")
    return "\n".join(parts)
