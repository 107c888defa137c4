"""The directory as a Ray actor, and the function that finds or creates it."""

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
    """The actor, one per cluster. Replicas repeat everything that it stores, so losing it costs one heartbeat."""

    def __init__(self, lease_s: float) -> None:
        self._directory = Directory(lease_s=lease_s, start_lease_s=_START_LEASE_S, life=time.time_ns())
        self._changed = asyncio.Event()
        self._read = asyncio.Event()
        self._readers: dict[str, tuple[float, tuple[int, int]]] = {}
        self._expiry: asyncio.Task[None] | None = None

    async def put(self, record: ReplicaRecord) -> None:
        """Receive a replica's heartbeat."""
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_forever())
        self._note(self._directory.put(record, time.monotonic()))

    async def remove(self, replica_id: str) -> None:
        self._note(self._directory.remove(replica_id))

    async def fail(self, model: str, reason: str) -> None:
        """Record that a replica failed to start for a reason that would stop any other."""
        self._directory.fail(model, reason)
        self._note(True)

    async def begin_start(self) -> None:
        """Prepare for applications being deployed."""
        self._directory.begin_start()
        self._note(True)

    async def begin_stop(self) -> None:
        """Announce that all applications are about to be deleted."""
        self._directory.begin_stop()
        self._note(True)

    async def watch(self, seen: tuple[int, int], timeout_s: float, reader: str = "") -> Snapshot:
        """Return the directory as soon as it differs from the version `seen`, or unchanged after `timeout_s`.

        By calling, a named `reader` confirms that it uses the version `seen`; `settle` waits for that. A reader is
        forgotten if it has not called again within a lease after its timeout.
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
        """Forget a reader that no longer follows the directory, so that `settle` does not wait for it."""
        self._readers.pop(reader, None)
        self._read.set()
        self._read = asyncio.Event()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until every named reader uses the current version; return False if one does not within `timeout_s`."""
        wanted = self._directory.snapshot.version
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_read(wanted):
                    await self._read.wait()
        return self._is_read(wanted)

    async def exchange(self, report: RouterReport) -> tuple[RouterReport, ...]:
        """Receive a router's report and return those of the others."""
        return self._directory.exchange(report, time.monotonic())

    async def reports(self) -> tuple[RouterReport, ...]:
        """Return the reports of all routers."""
        return self._directory.reports(time.monotonic())

    async def announce(self, record: ServiceRecord) -> tuple[RouterReport, ...]:
        """Receive an OCR service's heartbeat and return all routers' reports."""
        self._directory.announce(record, time.monotonic())
        return self._directory.reports(time.monotonic())

    async def withdraw(self, service_id: str) -> None:
        """Remove an OCR service that is stopping."""
        self._directory.withdraw(service_id)

    async def services(self) -> tuple[ServiceRecord, ...]:
        """Return the live OCR services."""
        return self._directory.services(time.monotonic())

    async def survey(self) -> tuple[Snapshot, tuple[RouterReport, ...]]:
        """Return the replicas and the routers' work for them, which autoscaling uses."""
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
    """Return the cluster's directory and create it if necessary. It outlives the process that created it."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(ReplicaDirectory)
    named = actor.options(name=DIRECTORY_NAME, namespace=namespace, lifetime="detached", get_if_exists=True)
    return named.remote(lease_s)
