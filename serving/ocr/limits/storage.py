"""What an OCR service keeps on the disk and in the database, and the bounds on both: in all, and for each tenant.

Documents lie in two folders: those that are being taken in or read (`uploads`), and those of jobs (`documents`).
Results of jobs are in the database. A bound that is reached refuses new documents and loses nothing that was taken in.

Services that share the folder each count what they see: their own files at once, those of others and of earlier runs
when they look (`look`), at the start and now and then. So the bounds can be passed by what comes in between two looks.
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
    own_message="Your documents take as much disk as one tenant's may; wait until jobs have ended, or delete some.",
    full_code=FULL,
    full_message="The service has no room for further documents; try again later.",
    retry_after_s=_RETRY_S,
)
_RESULTS = Refusals(
    own_code=_OWN_CODE,
    own_message="Results of your jobs take as much room as one tenant's may; delete jobs that you have fetched.",
    full_code=FULL,
    full_message="The service has no room for further results of jobs; try again later.",
    retry_after_s=_RETRY_S,
)

FindOwners = Callable[[Collection[str]], Awaitable[Mapping[str, str]]]
"""From the ids of jobs to their owners, those that there are."""


@dataclass(slots=True)
class _File:
    owner: str
    """Empty when nobody knows."""
    size_bytes: int
    is_growing: bool = False
    """Whether this process writes it."""


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
        """On the disk, as far as it is known."""
        return self._on_disk.num_held

    @property
    def num_result_bytes(self) -> int:
        """In the database, as it was when somebody looked."""
        return self._results.num_held

    @property
    def used_ratios(self) -> dict[str, float]:
        """Part of each bound that is used."""
        return {
            "documents": self._on_disk.num_held / self._on_disk.total,
            "results": self._results.num_held / self._results.total,
        }

    def make_folders(self) -> None:
        """Raises OSError when they cannot be used."""
        for folder in (self.uploads, self.documents):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def check_documents(self, holder: Holder) -> None:
        """Whether a document may be taken in, as long as nobody knows how large it is.

        Raises:
            RateLimitError: the tenant's documents take as much disk as they may.
            OverloadedError: those of all do.
        """
        self._on_disk.check(holder)

    def check_results(self, holder: Holder) -> None:
        """Whether a job may be added.

        Raises:
            RateLimitError: results of the tenant's jobs take as much room as they may.
            OverloadedError: those of all do.
        """
        self._results.check(holder)

    @contextlib.asynccontextmanager
    async def receiving(self, holder: Holder) -> AsyncIterator[StoredFile]:
        """A new file for a document that comes in; it goes when the context ends, unless it was moved.

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
        """Make room for what is to be written.

        Raises:
            RateLimitError: the tenant's documents take as much disk as they may.
            OverloadedError: those of all do.
        """
        self._on_disk.check(holder, num_bytes)
        self._on_disk.add(holder.owner, num_bytes)
        self._files[path].size_bytes += num_bytes

    async def move(self, path: Path, to: Path) -> None:
        """Raises OverloadedError when the disk is full."""
        with refusing_full_disk():
            await asyncio.to_thread(path.rename, to)
        file = self._files.pop(path)
        file.is_growing = False
        self._files[to] = file

    async def remove(self, path: Path) -> None:
        """A file that is not there is none the less gone."""
        await asyncio.to_thread(path.unlink, missing_ok=True)
        self._forget(path)

    async def look(self, find_owners: FindOwners) -> None:
        """Count what lies in the folders: files of other services and of earlier runs come and go unheard.

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
        """What the results of jobs take in the database now, in bytes by owner."""
        self._results.replace(sizes)

    def _forget(self, path: Path) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            self._on_disk.add(file.owner, -file.size_bytes)


class StoredFile:
    """A document that is being written."""

    def __init__(self, storage: Storage, holder: Holder, path: Path, handle: int) -> None:
        self.path = path
        self._storage = storage
        self._holder = holder
        self._out = os.fdopen(handle, "wb")

    async def write(self, data: bytes) -> None:
        """Raises:
        RateLimitError: the tenant's documents take as much disk as they may.
        OverloadedError: those of all do, or the disk is full.
        """
        self._storage.grow(self.path, self._holder, len(data))
        with refusing_full_disk():
            await asyncio.to_thread(self._out.write, data)

    async def close(self) -> None:
        """Raises OverloadedError when the disk is full. Closing again does nothing."""
        with refusing_full_disk():
            await asyncio.to_thread(self._out.close)


@contextlib.contextmanager
def refusing_full_disk() -> Iterator[None]:
    """A disk, or a quota of it, that is full is no fault of the service's or the request's.

    Raises:
        OverloadedError: in the place of such an OSError; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        logger.error("there is no room on the disk of the OCR service's documents: %s", error)
        raise OverloadedError(_DOCUMENTS.full_message, _RETRY_S, code=FULL) from error


def _list_sizes(folders: Collection[Path]) -> dict[Path, int]:
    """Files in folders, in bytes."""
    found = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found[Path(entry.path)] = entry.stat(follow_symlinks=False).st_size
    return found
