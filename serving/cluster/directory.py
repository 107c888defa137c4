"""Which engine replicas there are: the records that replicas send and routers read, and the rules of the list. Pure.

A replica says what it is every `heartbeat_s`; a record that was not repeated for `lease_s` is dropped, so nobody needs
to be told of a death. Repeating is also what fills a directory that was itself restarted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class ReplicaState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """One engine replica, as it describes itself."""

    replica_id: str
    model: str
    """Canonical name of the model it runs."""
    base_url: str
    """`http://host:port` of its own OpenAI server; empty while it starts."""
    state: ReplicaState
    max_num_seqs: int = 0
    """Sequences that its engine runs at once; more wait in the engine."""
    capacity_tokens: int = 0
    """Tokens that its KV cache holds: the work it can have under way."""
    max_model_len: int = 0
    """Longest prompt and answer together, in tokens."""
    image_config: tuple[tuple[str, Any], ...] | None = None
    """What decides an image's resolution mode (`serving.plugin.modes.selection.ModeRules`); the rest is as published.
    None where the engine has not said how it reads images."""
    image_options: tuple[tuple[str, Any], ...] = ()
    """The server's own `mm_processor_kwargs`."""
    stage: str = ""
    """What it is doing while it starts, in words for a person."""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The list at one moment. `version` grows with every change and names the directory's life it belongs to."""

    version: tuple[int, int]
    records: tuple[ReplicaRecord, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    """By model: why its last replica that failed to start did, if no other start could mend it."""
    is_stopping: bool = False
    """Whether the whole stack goes down: routers finish what runs and take nothing new."""

    def ready(self, model: str) -> tuple[ReplicaRecord, ...]:
        """Replicas that may get new requests for a model."""
        return tuple(r for r in self.records if r.model == model and r.state is ReplicaState.READY)


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What one router has let through for one tenant since it started (totals), and what runs now."""

    num_requests: float = 0
    """By their weight: see `serving.router.access.limits`."""
    num_tokens: int = 0
    num_running: int = 0
    """Requests that generate."""
    num_documents: int = 0
    num_lookups: int = 0


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What one router tells the others, through the directory. All work is in tokens.

    Totals only ever grow while `router_id` lives, so a report that is lost or read twice changes nothing.
    """

    router_id: str
    queued_work: tuple[tuple[str, int], ...] = ()
    """Waiting in the router, by model."""
    replica_work: tuple[tuple[str, int], ...] = ()
    """Under way, by replica id."""
    tenants: tuple[tuple[str, TenantUse], ...] = ()
    metrics_url: str = ""
    """Where its own metrics are scraped; empty while it does not serve them."""
    url: str = ""
    """`http://host:port` where it answers; empty where it does not know."""


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One OCR service, as it describes itself."""

    service_id: str
    url: str
    """`http://host:port`"""
    metrics_url: str = ""


EMPTY = Snapshot(version=(0, 0))


@dataclass(slots=True)
class Directory:
    """The list itself; the clock (seconds, monotonic) is passed in."""

    lease_s: float
    start_lease_s: float
    """The same while a replica starts: importing and loading hold its event loop for long."""
    life: int
    """Tells one directory process from the next: versions of two lives never compare equal."""
    _change: int = 0
    _failures: dict[str, str] = field(default_factory=dict)
    _is_stopping: bool = False
    _records: dict[str, ReplicaRecord] = field(default_factory=dict)
    _heard_s: dict[str, float] = field(default_factory=dict)
    _reports: dict[str, tuple[float, RouterReport]] = field(default_factory=dict)
    _services: dict[str, tuple[float, ServiceRecord]] = field(default_factory=dict)

    def put(self, record: ReplicaRecord, now_s: float) -> bool:
        """Take a replica's word; returns whether the list changed."""
        self._heard_s[record.replica_id] = now_s
        if self._records.get(record.replica_id) == record:
            return False
        self._records[record.replica_id] = record
        self._change += 1
        return True

    def fail(self, model: str, reason: str) -> None:
        """A replica could not start, and neither could another."""
        self._failures[model] = reason
        self._change += 1

    def begin_start(self) -> None:
        """Applications are deployed, anew perhaps: what failed before, or was stopping, is another story."""
        if self._failures or self._is_stopping:
            self._failures.clear()
            self._is_stopping = False
            self._change += 1

    def begin_stop(self) -> None:
        """All applications are about to end."""
        self._is_stopping = True
        self._change += 1

    def remove(self, replica_id: str) -> bool:
        """A replica says goodbye; returns whether it was known."""
        self._heard_s.pop(replica_id, None)
        if self._records.pop(replica_id, None) is None:
            return False
        self._change += 1
        return True

    def expire(self, now_s: float) -> bool:
        """Drop the replicas that were not heard of for a lease; returns whether there were any."""
        late = [
            replica_id
            for replica_id, record in self._records.items()
            if now_s - self._heard_s[replica_id]
            > (self.start_lease_s if record.state is ReplicaState.STARTING else self.lease_s)
        ]
        for replica_id in late:
            self.remove(replica_id)
        return bool(late)

    def exchange(self, report: RouterReport, now_s: float) -> tuple[RouterReport, ...]:
        """Take a router's report; gives those of the others, without routers that have been silent for a lease."""
        self._reports[report.router_id] = (now_s, report)
        return tuple(other for other in self.reports(now_s) if other.router_id != report.router_id)

    def reports(self, now_s: float) -> tuple[RouterReport, ...]:
        """The last report of every router that is alive."""
        self._reports = {key: known for key, known in self._reports.items() if now_s - known[0] <= self.lease_s}
        return tuple(report for _, report in self._reports.values())

    def announce(self, record: ServiceRecord, now_s: float) -> None:
        """Take an OCR service's word."""
        self._services[record.service_id] = (now_s, record)

    def withdraw(self, service_id: str) -> None:
        """An OCR service takes no more requests."""
        self._services.pop(service_id, None)

    def services(self, now_s: float) -> tuple[ServiceRecord, ...]:
        """OCR services that have been heard of within a lease, in a steady order."""
        self._services = {key: known for key, known in self._services.items() if now_s - known[0] <= self.lease_s}
        return tuple(record for _, (_, record) in sorted(self._services.items()))

    @property
    def snapshot(self) -> Snapshot:
        records = sorted(self._records.values(), key=lambda record: record.replica_id)
        failures = tuple(sorted(self._failures.items()))
        return Snapshot(
            version=(self.life, self._change), records=tuple(records), failures=failures, is_stopping=self._is_stopping
        )
