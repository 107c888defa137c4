"""The directory as a Ray actor, and the two ways to reach it: telling it of a replica, and following its list."""

from __future__ import annotations

import asyncio
import contextlib
import time

import ray
from ray.actor import ActorHandle

from serving.directory import Directory, ReplicaRecord, RouterReport, Snapshot

DIRECTORY_NAME = "replica-directory"
_START_LEASE_S = 900.0


class ReplicaDirectory:
    """An actor, one per cluster. It holds nothing that replicas would not tell again: losing it costs a heartbeat."""

    def __init__(self, lease_s: float) -> None:
        self._directory = Directory(lease_s=lease_s, start_lease_s=_START_LEASE_S, life=time.time_ns())
        self._changed = asyncio.Event()
        self._expiry: asyncio.Task[None] | None = None

    async def put(self, record: ReplicaRecord) -> None:
        """A replica's heartbeat."""
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire_forever())
        self._note(self._directory.put(record, time.monotonic()))

    async def remove(self, replica_id: str) -> None:
        self._note(self._directory.remove(replica_id))

    async def watch(self, seen: tuple[int, int], timeout_s: float) -> Snapshot:
        """The list as soon as it differs from the version `seen`, or as it is after `timeout_s`."""
        if self._directory.snapshot.version == seen:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), timeout_s)
        return self._directory.snapshot

    async def exchange(self, report: RouterReport) -> tuple[RouterReport, ...]:
        """A router's report in, the others' out."""
        return self._directory.exchange(report, time.monotonic())

    async def reports(self) -> tuple[RouterReport, ...]:
        """Of all routers: the work that replicas are scaled by."""
        return self._directory.reports(time.monotonic())

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
