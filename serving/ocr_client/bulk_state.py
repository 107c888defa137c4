"""The progress of a bulk run, in a SQLite file beside its results, so that the next run can resume.

Files are identified by their paths; a file starts over when its content or the options have changed. Pages are stored
as they arrive, so a stored page is never read again, even if the service or the run is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serving.ocr_api.shapes import OcrPage

STATE_NAME = ".serving-ocr.sqlite"
_LOCK_NAME = ".serving-ocr.lock"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    options TEXT NOT NULL,
    submission TEXT NOT NULL,
    chosen TEXT,
    job TEXT,
    after INTEGER NOT NULL DEFAULT 0,
    num_pages INTEGER,
    is_over INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS pages (
    path TEXT NOT NULL,
    number INTEGER NOT NULL,
    is_completed INTEGER NOT NULL,
    page TEXT NOT NULL,
    PRIMARY KEY (path, number)
);
"""


class RunningError(Exception):
    """Another run is writing to the same folder."""


@dataclass(frozen=True, slots=True)
class FileState:
    """The progress of one file."""

    digest: str
    """SHA-256 of the file."""
    submission: str
    """The Idempotency-Key that the file is submitted with."""
    chosen: str | None
    """The selection of pages that is submitted (`1-3,7`); None for all that were asked for."""
    job: str | None
    after: int
    """`seq` of the last page that was fetched from the job."""
    num_pages: int | None
    """Number of pages of the document, as reported by the first job."""
    is_over: bool
    """Whether its job has ended and all of its pages have been fetched."""


class BulkState:
    """The state of one folder. Only one run at a time may have it open."""

    def __init__(self, folder: Path) -> None:
        """Open or create the state of a folder.

        Raises:
            RunningError: another run has it open.
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock: IO[str] = (folder / _LOCK_NAME).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RunningError from error
        self._database = sqlite3.connect(folder / STATE_NAME, isolation_level=None)
        # Killing the process loses nothing; a power failure may lose the last pages, which are then fetched again.
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()
        self._lock.close()

    def open_file(self, path: str, digest: str, options: str) -> FileState:
        """A file's progress, which is reset if the file, its content or the options are new."""
        row = self._database.execute("SELECT digest, options FROM files WHERE path = ?", (path,)).fetchone()
        if row != (digest, options):
            self._database.execute("BEGIN")
            self._database.execute("DELETE FROM pages WHERE path = ?", (path,))
            self._database.execute(
                "INSERT OR REPLACE INTO files (path, digest, options, submission) VALUES (?, ?, ?, ?)",
                (path, digest, options, uuid.uuid4().hex),
            )
            self._database.execute("COMMIT")
        return self.find(path)

    def find(self, path: str) -> FileState:
        """The progress of a file that was opened."""
        columns = "digest, submission, chosen, job, after, num_pages, is_over"
        row = self._database.execute(f"SELECT {columns} FROM files WHERE path = ?", (path,)).fetchone()
        digest, submission, chosen, job, after, num_pages, is_over = row
        return FileState(digest, submission, chosen, job, after, num_pages, bool(is_over))

    def find_left_jobs(self, kept: Collection[str]) -> list[tuple[str, str, str]]:
        """Paths, options and jobs of files that an earlier run left unfinished, other than those of `kept`."""
        rows = self._database.execute("SELECT path, options, job FROM files WHERE job IS NOT NULL AND is_over = 0")
        return [(path, options, job) for path, options, job in rows.fetchall() if path not in kept]

    def find_stale_job(self, path: str, digest: str, options: str) -> str | None:
        """The unfinished job of a file that has changed since, or that was read with other options."""
        query = "SELECT job FROM files WHERE path = ? AND is_over = 0 AND (digest != ? OR options != ?)"
        row = self._database.execute(query, (path, digest, options)).fetchone()
        return row[0] if row is not None else None

    def begin_job(self, path: str, job: str) -> None:
        """Record the job that the service created."""
        self._database.execute("UPDATE files SET job = ? WHERE path = ?", (job, path))

    def count_pages(self, path: str, num_pages: int) -> None:
        """Record how many pages the document has."""
        self._database.execute("UPDATE files SET num_pages = ? WHERE path = ?", (num_pages, path))

    def begin_again(self, path: str, chosen: str | None) -> None:
        """Prepare another job for these pages; stored pages are kept."""
        self._database.execute(
            "UPDATE files SET submission = ?, chosen = ?, job = NULL, after = 0, is_over = 0 WHERE path = ?",
            (uuid.uuid4().hex, chosen, path),
        )

    def add_pages(self, path: str, pages: tuple[OcrPage, ...], after: int) -> None:
        """Store pages and the `seq` of the last of them, in one transaction."""
        rows = [(path, page.number, page.is_completed, page.model_dump_json()) for page in pages]
        self._database.execute("BEGIN")
        self._database.executemany("INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?)", rows)
        self._database.execute("UPDATE files SET after = ? WHERE path = ?", (after, path))
        self._database.execute("COMMIT")

    def finish(self, path: str) -> None:
        """Record that the file's job is over."""
        self._database.execute("UPDATE files SET is_over = 1 WHERE path = ?", (path,))

    def pages(self, path: str) -> list[OcrPage]:
        """Stored pages in document order."""
        rows = self._database.execute("SELECT page FROM pages WHERE path = ? ORDER BY number", (path,))
        return [OcrPage.model_validate_json(row[0]) for row in rows]

    def numbers(self, path: str, *, is_completed: bool) -> list[int]:
        """Numbers of stored pages that were read, or of those that failed."""
        query = "SELECT number FROM pages WHERE path = ? AND is_completed = ? ORDER BY number"
        return [row[0] for row in self._database.execute(query, (path, is_completed))]


def digest_file(file: Path) -> str:
    """The SHA-256 of a file; raises OSError when it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_options(fields: dict[str, object]) -> str:
    """Options in canonical form, for comparison with those of the previous run."""
    return json.dumps(fields, sort_keys=True)


def join_ranges(numbers: list[int]) -> str:
    """`1-3,7` of [1, 2, 3, 7]."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
