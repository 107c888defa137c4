"""Accounting of what an OCR service stores on disk and in the database, with limits in total and per tenant.

Documents are in two folders: `uploads` while they are received or read, `documents` for those of jobs. Results of jobs
are in the database. When a limit is reached new documents are refused; nothing that was accepted is lost.

Services that share the folder count for themselves: their own files immediately, those of other services and of earlier
runs when they scan the folder (`look`), at startup and periodically. The limits can therefore be exceeded by what other
services receive between two scans.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.errors import OverloadedError
from serving.ocr.limits.shares import Holder, Refusals, Shares
from serving.settings.ocr import OcrSettings

logger = logging.getLogger(__name__)

_RETRY_S = 30.0
FULL = "storage_full"
_OWN_CODE = "tenant_storage_full"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_DOCUMENTS = Refusals(
    own_code=_OWN_CODE,
    own_message="Your documents use all the disk space that one tenant may use; wait for jobs to end, or delete some.",
    full_code=FULL,
    full_message="The service has no disk space for further documents; try again later.",
    retry_after_s=_RETRY_S,
)
_RESULTS = Refusals(
    own_code=_OWN_CODE,
    own_message="The results of your jobs use all of the space that one tenant may use; delete jobs you have fetched.",
    full_code=FULL,
    full_message="The service has no space for further results of jobs; try again later.",
    retry_after_s=_RETRY_S,
)

FindOwners = Callable[[Collection[str]], Awaitable[Mapping[str, str]]]
"""Maps job ids to the owners of those jobs that exist."""


@dataclass(slots=True)
class _File:
    owner: str
    """Empty when it is not known."""
    size_bytes: int
    is_growing: bool = False
    """Whether this process is still writing it."""


class Storage:
    """One per process. Use it inside one event loop."""

    def __init__(self, settings: OcrSettings) -> None:
        self.uploads = settings.directory / "uploads"
        self.documents = settings.directory / "documents"
        self._on_disk = Shares(
            settings.max_stored_bytes, settings.tenant_share, _DOCUMENTS, least=settings.max_document_bytes
        )
        self._results = Shares(
            settings.max_result_bytes, settings.tenant_share, _RESULTS, least=settings.max_document_bytes
        )
        self._files: dict[Path, _File] = {}

    @property
    def num_document_bytes(self) -> int:
        """Bytes on disk, as far as known."""
        return self._on_disk.num_held

    @property
    def num_result_bytes(self) -> int:
        """Bytes in the database at the last scan."""
        return self._results.num_held

    @property
    def used_ratios(self) -> dict[str, float]:
        """Used fraction of each limit."""
        return {
            "documents": self._on_disk.num_held / self._on_disk.total,
            "results": self._results.num_held / self._results.total,
        }

    def make_folders(self) -> None:
        """Create the folders; raises OSError when they cannot be used."""
        for folder in (self.uploads, self.documents):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def check_documents(self, holder: Holder, num_bytes: int = 1) -> None:
        """Check whether a document may be stored; without its size, whether there is any space left.

        Raises:
            RateLimitError: the tenant's documents have reached their limit.
            OverloadedError: all documents together have.
        """
        self._on_disk.check(holder, num_bytes)

    def check_results(self, holder: Holder) -> None:
        """Check whether a job may be added.

        Raises:
            RateLimitError: the results of the tenant's jobs have reached their limit.
            OverloadedError: all results together have.
        """
        self._results.check(holder)

    @contextlib.asynccontextmanager
    async def receiving(self, holder: Holder) -> AsyncIterator[StoredFile]:
        """A new file for an incoming document, deleted when the context ends unless it was moved.

        Raises:
            OverloadedError: the disk is full.
        """
        with refusing_full_disk():
            handle, name = tempfile.mkstemp(dir=self.uploads)
        path = Path(name)
        self._files[path] = _File(holder.owner, 0, is_growing=True)
        try:
            yield StoredFile(self, holder, path, handle)
        finally:
            await self.remove(path)

    def grow(self, path: Path, holder: Holder, num_bytes: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            RateLimitError: the tenant's documents have reached their limit.
            OverloadedError: all documents together have.
        """
        self._on_disk.check(holder, num_bytes)
        self._on_disk.add(holder.owner, num_bytes)
        self._files[path].size_bytes += num_bytes

    async def move(self, path: Path, to: Path) -> None:
        """Rename a file; raises OverloadedError when the disk is full."""
        with refusing_full_disk():
            await asyncio.to_thread(path.rename, to)
        file = self._files.pop(path)
        file.is_growing = False
        self._files[to] = file

    async def remove(self, path: Path) -> None:
        """Delete a file, if it exists."""
        await asyncio.to_thread(path.unlink, missing_ok=True)
        self._forget(path)

    async def look(self, find_owners: FindOwners) -> None:
        """Scan the folders, where other services and earlier runs add and remove files too.

        Raises:
            OSError: a folder cannot be read.
        """
        known = set(self._files)
        found = await asyncio.to_thread(_list_sizes, (self.uploads, self.documents))
        for path in known - found.keys():
            self._forget(path)
        strange = [path for path in found if not (path in self._files and self._files[path].owner)]
        owners = await find_owners([path.name for path in strange if path.parent == self.documents])
        for path, size_bytes in found.items():
            file = self._files.get(path)
            if file is not None and (file.owner or path.name not in owners):
                if not file.is_growing:
                    self._on_disk.add(file.owner, size_bytes - file.size_bytes)
                    file.size_bytes = size_bytes
                continue
            self._forget(path)
            owner = owners.get(path.name, "") if path.parent == self.documents else ""
            self._files[path] = _File(owner, size_bytes)
            self._on_disk.add(owner, size_bytes)

    def see_results(self, sizes: Mapping[str, int]) -> None:
        """Record the sizes of job results in the database, in bytes by owner."""
        self._results.replace(sizes)

    def _forget(self, path: Path) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            self._on_disk.add(file.owner, -file.size_bytes)


class StoredFile:
    """A document's file while it is written."""

    def __init__(self, storage: Storage, holder: Holder, path: Path, handle: int) -> None:
        self.path = path
        self._storage = storage
        self._holder = holder
        self._out = os.fdopen(handle, "wb")

    async def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            RateLimitError: the tenant's documents have reached their limit.
            OverloadedError: all documents together have, or the disk is full.
        """
        self._storage.grow(self.path, self._holder, len(data))
        with refusing_full_disk():
            await asyncio.to_thread(self._out.write, data)

    async def close(self) -> None:
        """Close the file; raises OverloadedError when the disk is full. Closing again does nothing."""
        with refusing_full_disk():
            await asyncio.to_thread(self._out.close)


@contextlib.contextmanager
def refusing_full_disk() -> Iterator[None]:
    """Turn the OSError of a full disk or an exhausted quota into a refusal.

    Raises:
        OverloadedError: the disk is full. Other errors are not changed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        logger.error("no space left on the disk with the OCR service's documents: %s", error)
        raise OverloadedError(_DOCUMENTS.full_message, _RETRY_S, code=FULL) from error


def _list_sizes(folders: Collection[Path]) -> dict[Path, int]:
    """Sizes of the files in some folders, in bytes."""
    found = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found[Path(entry.path)] = entry.stat(follow_symlinks=False).st_size
    return found
