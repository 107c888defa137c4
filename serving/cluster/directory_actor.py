"""The directory as a Ray actor, and the two ways to reach it: telling it of a replica, and following its list."""

from __future__ import annotations

import asyncio
import contextlib
import time

import ray
from ray.actor import ActorHandle

from serving.cluster.directory import Directory, ReplicaRecord, RouterReport, ServiceRecord, Snapshot

DIRECTORY_NAME = "replica-directory"
_START_LEASE_S = 900.0


class ReplicaDirectory:
    """An actor, one per cluster. It holds nothing that replicas would not tell again: losing it costs a heartbeat."""

    def __init__(self, lease_s: float) -> None:
        self._directory = Directory(lease_s=lease_s, start_lease_s=_START_LEASE_S, life=time.time_ns())
        self._changed = asyncio.Event()
        self._read = asyncio.Event()
        self._readers: dict[str, tuple[float, tuple[int, int]]] = {}
        self._expiry: asyncio.Task[None] | None = None

    async def put(self, record: ReplicaRecord) -> None:
        """A replica's heartbeat."""
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_forever())
        self._note(self._directory.put(record, time.monotonic()))

    async def remove(self, replica_id: str) -> None:
        self._note(self._directory.remove(replica_id))

    async def fail(self, model: str, reason: str) -> None:
        """A replica could not start, and neither could another."""
        self._directory.fail(model, reason)
        self._note(True)

    async def begin_start(self) -> None:
        """Before applications are deployed."""
        self._directory.begin_start()
        self._note(True)

    async def begin_stop(self) -> None:
        """Before they are all deleted."""
        self._directory.begin_stop()
        self._note(True)

    async def watch(self, seen: tuple[int, int], timeout_s: float, reader: str = "") -> Snapshot:
        """The list as soon as it differs from the version `seen`, or as it is after `timeout_s`.

        A `reader` with a name says by asking for more that it goes by the version `seen`; `settle` waits for that. It
        is forgotten when it has not asked for a lease after its timeout.
        """
        if reader:
            self._readers[reader] = (time.monotonic() + timeout_s + self._directory.lease_s, seen)
            self._read.set()
            self._read = asyncio.Event()
        if self._directory.snapshot.version == seen:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), timeout_s)
        return self._directory.snapshot

    async def leave(self, reader: str) -> None:
        """A reader follows the list no longer; nobody needs to wait for it."""
        self._readers.pop(reader, None)
        self._read.set()
        self._read = asyncio.Event()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until every named reader goes by the list as it is now; False when one does not within `timeout_s`."""
        wanted = self._directory.snapshot.version
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_read(wanted):
                    await self._read.wait()
        return self._is_read(wanted)

    async def exchange(self, report: RouterReport) -> tuple[RouterReport, ...]:
        """A router's report in, the others' out."""
        return self._directory.exchange(report, time.monotonic())

    async def reports(self) -> tuple[RouterReport, ...]:
        """Of all routers."""
        return self._directory.reports(time.monotonic())

    async def announce(self, record: ServiceRecord) -> tuple[RouterReport, ...]:
        """An OCR service's heartbeat in, all routers' reports out."""
        self._directory.announce(record, time.monotonic())
        return self._directory.reports(time.monotonic())

    async def withdraw(self, service_id: str) -> None:
        """An OCR service says goodbye."""
        self._directory.withdraw(service_id)

    async def services(self) -> tuple[ServiceRecord, ...]:
        """OCR services that there are."""
        return self._directory.services(time.monotonic())

    async def survey(self) -> tuple[Snapshot, tuple[RouterReport, ...]]:
        """Replicas and the work that routers have for them: what replicas are scaled by."""
        return self._directory.snapshot, self._directory.reports(time.monotonic())

    def _is_read(self, version: tuple[int, int]) -> bool:
        now_s = time.monotonic()
        self._readers = {name: known for name, known in self._readers.items() if known[0] >= now_s}
        return all(seen >= version for _, seen in self._readers.values())

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(self._directory.lease_s / 4)
            self._note(self._directory.expire(time.monotonic()))

    def _note(self, has_changed: bool) -> None:
        if has_changed:
            self._changed.set()
            self._changed = asyncio.Event()


def reach_directory(namespace: str, lease_s: float) -> ActorHandle:
    """The cluster's directory, made if it is not there yet. It outlives whoever made it."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(ReplicaDirectory)
    named = actor.options(name=DIRECTORY_NAME, namespace=namespace, lifetime="detached", get_if_exists=True)
    return named.remote(lease_s)
