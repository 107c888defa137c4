"""The spool: a journal on the local disk that every record is written to first.

Each writer has a directory, locked for as long as it lives (with `flock`, which its death releases). Every record is
appended with a single `write`, after which it survives the death of the process; periodic `fsync` protects against a
loss of power. Segments are deleted only after the database has committed their records. A router that finds the
directory of a dead writer adopts it and reads it to the end. Reading a record twice does no harm: the database accepts
a request id once. A spool accepts everything: `journal_room` decides when no more requests may begin.

    <root>/<owner>/lock
    <root>/<owner>/00000000000000000001.journal ...
    <root>/<owner>/open                             requests without a record yet, see `open_requests`
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import re
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from serving.billing.journal_frames import MAX_PAYLOAD_BYTES, decode_frames, encode_frame
from serving.billing.open_requests import OpenRequests, read_open_requests
from serving.billing.records import RequestRecord
from serving.settings.billing import SpoolSettings

logger = logging.getLogger(__name__)

_LOCK = "lock"
_JOURNAL = ".journal"
_OPEN = "open"
_DAMAGED = ".damaged"
_PIECE_BYTES = 2 * MAX_PAYLOAD_BYTES
_MAX_KEPT = 4096


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
    size_bytes: int
    is_sealed: bool
    """Nothing more is appended."""
    is_synced: bool = False
    damaged_bytes: int = 0
    kept: deque[tuple[RequestRecord, int]] | None = None
    """Its uncommitted records with their sizes on disk, if all of them are still in memory, so that their writer need
    not decode them. None: they are read from disk."""


@dataclass(slots=True)
class Spool:
    """One writer's journal, open and locked. Created by `open_spool` or `adopt_spool`; not thread-safe."""

    directory: Path
    settings: SpoolSettings
    lock_fd: int
    size_bytes: int = 0
    """Uncommitted bytes, including damaged ones."""
    num_written: int = 0
    """Records appended by this process."""
    damaged_bytes: int = 0
    """Bytes of lost records, found while reading. A frame torn by its writer's death is not counted: it was never
    complete."""
    open_requests: OpenRequests = field(init=False)
    _segments: list[_Segment] = field(default_factory=list)
    _offset_bytes: int = 0
    """Committed bytes of the first segment."""
    _read_bytes: int = 0
    """Bytes of it that have been read."""
    _num_kept: int = 0
    _num_read_kept: int = 0
    """Kept records among what was read."""
    _read_damage_bytes: int = 0

    def __post_init__(self) -> None:
        for path in sorted(self.directory.glob(f"*{_JOURNAL}")):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._segments.append(_Segment(path, fd, os.fstat(fd).st_size, is_sealed=True))
        self.size_bytes = sum(segment.size_bytes for segment in self._segments)
        self.open_requests = OpenRequests(self.directory / _OPEN)

    @property
    def is_empty(self) -> bool:
        """Whether everything in it is committed and no request is open."""
        return self.size_bytes == 0 and not self.open_requests and not self.open_requests.has_left_over

    def append(self, record: RequestRecord) -> int:
        """Write a record; it survives this process as soon as this returns. Returns its size in bytes.

        Raises:
            OSError: the disk refuses it; nothing of it is left behind.
            ValueError: it cannot be encoded.
        """
        frame = encode_frame(record)
        last = self._segments[-1] if self._segments else None
        segment = self._begin_segment() if last is None or last.is_sealed else last
        num_bytes = os.write(segment.fd, frame)
        if num_bytes != len(frame):
            os.ftruncate(segment.fd, segment.size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(segment.path))
        segment.size_bytes += num_bytes
        segment.is_sealed = segment.size_bytes >= self.settings.segment_bytes
        self.size_bytes += num_bytes
        self.num_written += 1
        segment.is_synced = False
        if segment.kept is not None:
            segment.kept.append((record, num_bytes))
            self._num_kept += 1
            if self._num_kept > _MAX_KEPT:  # the database is unavailable: memory must not grow with what waits for it
                self._num_kept -= len(segment.kept)
                segment.kept = None
        return num_bytes

    def read(self, limit: int) -> list[RequestRecord]:
        """The oldest uncommitted records, at most `limit`.

        Returns the same records again until `commit`.
        """
        self._read_bytes = self._offset_bytes
        self._read_damage_bytes = self._num_read_kept = 0
        while self._segments:
            segment = self._segments[0]
            if segment.kept:
                return self._read_kept(segment.kept, limit)
            piece = os.pread(segment.fd, min(_PIECE_BYTES, segment.size_bytes - self._read_bytes), self._read_bytes)
            is_end = self._read_bytes + len(piece) >= segment.size_bytes
            found = decode_frames(piece, limit=limit, is_end=is_end)
            self._read_bytes += found.size_bytes
            self._read_damage_bytes += found.damaged_bytes
            if found.records:
                return found.records
            if not is_end:
                continue
            if not segment.is_sealed:
                break
            self.commit()
        return []

    def commit(self) -> None:
        """The records that were read last are in the database; finished segments are deleted."""
        if not self._segments:
            return
        first = self._segments[0]
        first.damaged_bytes += self._read_damage_bytes
        self.damaged_bytes += self._read_damage_bytes
        self._read_damage_bytes = 0
        if first.kept is not None:
            for _ in range(self._num_read_kept):
                first.kept.popleft()
            self._num_kept -= self._num_read_kept
        self._num_read_kept = 0
        self.size_bytes -= self._read_bytes - self._offset_bytes
        self._offset_bytes = self._read_bytes
        if first.is_sealed and self._offset_bytes >= first.size_bytes:
            self._drop(self._segments.pop(0))
            self._offset_bytes = self._read_bytes = 0

    def _read_kept(self, kept: deque[tuple[RequestRecord, int]], limit: int) -> list[RequestRecord]:
        first = list(itertools.islice(kept, limit))
        self._num_read_kept = len(first)
        self._read_bytes += sum(num_bytes for _, num_bytes in first)
        return [record for record, _ in first]

    def take_unsynced(self) -> tuple[int, ...]:
        """Descriptors of what was written since the last call, for `sync_and_close` in another thread."""
        unsynced = [segment for segment in self._segments if not segment.is_synced]
        if not unsynced:
            return ()
        for segment in unsynced:
            segment.is_synced = True
        directory = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        return (*(os.dup(segment.fd) for segment in unsynced), directory)

    def close(self) -> None:
        """Close and unlock it: uncommitted records stay for the router that adopts it; an empty spool is removed."""
        is_empty = self.is_empty
        for segment in self._segments:
            if is_empty:
                segment.path.unlink(missing_ok=True)
            os.close(segment.fd)
        self.open_requests.close()
        if is_empty:
            (self.directory / _LOCK).unlink(missing_ok=True)
            try:
                self.directory.rmdir()
            except OSError:  # damaged segments are kept in it for inspection
                logger.warning("%s is not removed, since there is more in it", self.directory)
        self._segments.clear()
        os.close(self.lock_fd)

    def _begin_segment(self) -> _Segment:
        # Numbers are never reused: damaged segments keep theirs.
        last = int(self._segments[-1].path.stem) if self._segments else 0
        path = self.directory / f"{max(time.time_ns(), last + 1):020d}{_JOURNAL}"
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        segment = _Segment(path, fd, 0, is_sealed=False, kept=deque())
        self._segments.append(segment)
        return segment

    def _drop(self, segment: _Segment) -> None:
        os.close(segment.fd)
        if segment.damaged_bytes:
            logger.error("%s has %d damaged bytes; it is kept", segment.path, segment.damaged_bytes)
            segment.path.rename(segment.path.with_suffix(_DAMAGED))
        else:
            segment.path.unlink(missing_ok=True)


def open_spool(root: Path, owner: str, settings: SpoolSettings) -> Spool:
    """Create a spool for a writer. A directory of that name that is in use or not fully committed is skipped."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", owner).lstrip(".") or "router"
    for attempt in itertools.count(1):
        directory = root / (name if attempt == 1 else f"{name}~{attempt}")
        directory.mkdir(parents=True, exist_ok=True)
        lock_fd = _lock(directory)
        if lock_fd is None:
            continue
        spool = Spool(directory, settings, lock_fd)
        if spool.is_empty:
            return spool
        spool.close()
    raise AssertionError("unreachable")


def adopt_spool(root: Path, settings: SpoolSettings, but: Collection[Path] = ()) -> Spool | None:
    """Lock and open a spool whose writer is dead; None if there is none. Those in `but` are skipped."""
    for directory in sorted(root.glob("*/")):
        if directory in but:
            continue
        lock_fd = _lock(directory)
        if lock_fd is None:
            continue
        spool = Spool(directory, settings, lock_fd)
        if not spool.is_empty:
            return spool
        spool.close()  # removes the directory
    return None


def read_spools(root: Path, limit: int) -> Iterator[list[RequestRecord]]:
    """All records in the spools of a root, of any writer, in lists of at most `limit`.

    Nothing is locked or removed; records that are committed meanwhile may be included or not.
    """
    for path in sorted(root.glob(f"*/*{_JOURNAL}")):
        try:
            text = path.read_bytes()
        except FileNotFoundError:  # committed and deleted meanwhile
            continue
        offset = 0
        while offset < len(text):
            found = decode_frames(text[offset : offset + _PIECE_BYTES], limit=limit, is_end=False)
            if not found.size_bytes:  # a frame that is being written, or is torn
                break
            offset += found.size_bytes
            if found.records:
                yield found.records


def count_open(root: Path) -> int:
    """Number of requests without a record in the spools of a root: in flight, or left open by dead routers."""
    return sum(len(read_open_requests(path)) for path in root.glob(f"*/{_OPEN}"))


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None if another process holds it or has just removed it."""
    path = directory / _LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def sync_and_close(fds: tuple[int, ...]) -> None:
    """Sync descriptors, so that what was written to them survives a loss of power, and close them."""
    try:
        for fd in fds:
            os.fsync(fd)
    finally:
        for fd in fds:
            os.close(fd)
