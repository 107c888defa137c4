"""The spool: a journal on the local disk that a record is in before it counts.

A directory per writer, locked as long as the writer lives (`flock`, which its death ends). Records are appended with
one `write` each, so they survive the death of the process from that moment, and `fsync` follows every so many
milliseconds for the loss of power. Segments are deleted only after the database has committed what is in them; whoever
finds a directory whose writer is dead reads it to the end in its place. Reading something twice is right: the database
takes a request id once. A spool takes whatever it is given: `journal_room` says when nothing more may be begun.

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
    """Nothing is appended any more."""
    is_synced: bool = False
    damaged_bytes: int = 0
    kept: deque[tuple[RequestRecord, int]] | None = None
    """Its records that are not committed, with their sizes on disk, where all of them are still in memory: whoever
    has written them need not decode them. None: they are read from the disk."""


@dataclass(slots=True)
class Spool:
    """One writer's journal, open and locked. Made by `open_spool` or `adopt_spool`; not safe between threads."""

    directory: Path
    settings: SpoolSettings
    lock_fd: int
    size_bytes: int = 0
    """Of what is not yet committed, damage included."""
    num_written: int = 0
    """Records that this process has appended."""
    damaged_bytes: int = 0
    """Found while reading: records that are lost. A frame torn by the writer's death is not counted, it never was."""
    open_requests: OpenRequests = field(init=False)
    _segments: list[_Segment] = field(default_factory=list)
    _offset_bytes: int = 0
    """How far the first segment is committed."""
    _read_bytes: int = 0
    """How far it has been read."""
    _num_kept: int = 0
    _num_read_kept: int = 0
    """How many of the kept records that was."""
    _read_damage_bytes: int = 0

    def __post_init__(self) -> None:
        for path in sorted(self.directory.glob(f"*{_JOURNAL}")):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._segments.append(_Segment(path, fd, os.fstat(fd).st_size, is_sealed=True))
        self.size_bytes = sum(segment.size_bytes for segment in self._segments)
        self.open_requests = OpenRequests(self.directory / _OPEN)

    @property
    def is_empty(self) -> bool:
        """Whether everything in it is committed, and no request open."""
        return self.size_bytes == 0 and not self.open_requests and not self.open_requests.has_left_over

    def append(self, record: RequestRecord) -> int:
        """Write one record; it survives this process from the return on. Returns the bytes it took.

        Raises:
            OSError: the disk does not take it; nothing of it is left behind.
            ValueError: it cannot be written at all.
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
            if self._num_kept > _MAX_KEPT:  # the database is away: memory must not grow with what waits for it
                self._num_kept -= len(segment.kept)
                segment.kept = None
        return num_bytes

    def read(self, limit: int) -> list[RequestRecord]:
        """The oldest records that are not committed, at most `limit`; none when there are none.

        The same ones again until `commit`.
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
        """What was read last is safe elsewhere; segments that are through are deleted."""
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
        """Descriptors, for `sync_and_close` in another thread, of what was written since the last call."""
        unsynced = [segment for segment in self._segments if not segment.is_synced]
        if not unsynced:
            return ()
        for segment in unsynced:
            segment.is_synced = True
        directory = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        return (*(os.dup(segment.fd) for segment in unsynced), directory)

    def close(self) -> None:
        """Give it back: what is not committed stays for whoever opens or adopts it; an empty one is removed."""
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
            except OSError:  # damaged segments are kept in it for a person to see
                logger.warning("%s is not removed, since there is more in it", self.directory)
        self._segments.clear()
        os.close(self.lock_fd)

    def _begin_segment(self) -> _Segment:
        # Numbers that never come again: damaged segments stay under theirs.
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
    """A new spool for a writer. One of that name that is in use, or not read to its end, is passed by."""
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
    """A spool whose writer is dead, locked by this process now; None when there is none. Those of `but` are left."""
    for directory in sorted(root.glob("*/")):
        if directory in but:
            continue
        lock_fd = _lock(directory)
        if lock_fd is None:
            continue
        spool = Spool(directory, settings, lock_fd)
        if not spool.is_empty:
            return spool
        spool.close()  # takes the directory away
    return None


def read_spools(root: Path, limit: int) -> Iterator[list[RequestRecord]]:
    """Everything that lies in the spools of a root, written by whomever, in lists of at most `limit`.

    Nothing is locked or removed; what was committed meanwhile may come or not.
    """
    for path in sorted(root.glob(f"*/*{_JOURNAL}")):
        try:
            text = path.read_bytes()
        except FileNotFoundError:  # committed and deleted since it was listed
            continue
        offset = 0
        while offset < len(text):
            found = decode_frames(text[offset : offset + _PIECE_BYTES], limit=limit, is_end=False)
            if not found.size_bytes:  # a frame that is being written, or was torn
                break
            offset += found.size_bytes
            if found.records:
                yield found.records


def count_open(root: Path) -> int:
    """Requests without a record in the spools of a root: in flight, or left by routers that have died."""
    return sum(len(read_open_requests(path)) for path in root.glob(f"*/{_OPEN}"))


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None when another process does, or has removed it just now."""
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
    """Make what was written to these survive a loss of power."""
    try:
        for fd in fds:
            os.fsync(fd)
    finally:
        for fd in fds:
            os.close(fd)
