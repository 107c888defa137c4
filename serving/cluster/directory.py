"""The directory of engine replicas: the records that replicas send and routers read, and its rules. Pure.

Every replica sends its record each `heartbeat_s`. A record without a heartbeat for `lease_s` is dropped, so the death
of a replica needs no report. Heartbeats also refill a directory that was restarted.
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
    """One engine replica, as it reports itself."""

    replica_id: str
    model: str
    """Canonical name of its model."""
    base_url: str
    """`http://host:port` of its OpenAI server; empty while it starts."""
    state: ReplicaState
    max_num_seqs: int = 0
    """Sequences that its engine runs concurrently; more wait in the engine."""
    capacity_tokens: int = 0
    """Tokens that fit into its KV cache, which is the work it can process at once."""
    max_model_len: int = 0
    """Longest prompt plus answer, in tokens."""
    image_config: tuple[tuple[str, Any], ...] | None = None
    """The settings that decide an image's resolution mode (`serving.plugin.modes.selection.ModeRules`), as far as they
    differ from the published ones. None if the engine has not reported them."""
    image_options: tuple[tuple[str, Any], ...] = ()
    """`mm_processor_kwargs` of its server."""
    stage: str = ""
    """What it is doing while it starts, for people to read."""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The directory at one moment. `version` increases with every change and includes the directory's incarnation."""

    version: tuple[int, int]
    records: tuple[ReplicaRecord, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    """By model: why its last replica failed to start, if another attempt would fail as well."""
    is_stopping: bool = False
    """Whether the whole stack is shutting down: routers finish running requests and refuse new ones."""

    def ready(self, model: str) -> tuple[ReplicaRecord, ...]:
        """Return the replicas that may receive new requests for a model."""
        return tuple(r for r in self.records if r.model == model and r.state is ReplicaState.READY)


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What one router has admitted for one tenant since it started (totals), and what is running now."""

    num_requests: float = 0
    """Requests counted by weight, see `serving.router.access.limits`."""
    num_tokens: int = 0
    num_running: int = 0
    """Running generation requests."""
    num_documents: int = 0
    num_lookups: int = 0


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What one router reports to the others through the directory. Work is measured in tokens.

    Totals never decrease during the life of `router_id`, so a report that is lost or read twice does no harm.
    """

    router_id: str
    queued_work: tuple[tuple[str, int], ...] = ()
    """Work queued in the router, by model."""
    replica_work: tuple[tuple[str, int], ...] = ()
    """Work in progress, by replica id."""
    tenants: tuple[tuple[str, TenantUse], ...] = ()
    metrics_url: str = ""
    """URL of its own metrics; empty while it does not serve them."""
    url: str = ""
    """`http://host:port` of the router; empty if unknown."""


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One OCR service, as it reports itself."""

    service_id: str
    url: str
    """`http://host:port`"""
    metrics_url: str = ""


EMPTY = Snapshot(version=(0, 0))


@dataclass(slots=True)
class Directory:
    """The directory itself. The time (seconds, monotonic) is passed in."""

    lease_s: float
    start_lease_s: float
    """The lease of a starting replica, which is longer: imports and loading block its event loop."""
    life: int
    """Identifies this incarnation of the directory: versions of two incarnations never compare equal."""
    _change: int = 0
    _failures: dict[str, str] = field(default_factory=dict)
    _is_stopping: bool = False
    _records: dict[str, ReplicaRecord] = field(default_factory=dict)
    _heard_s: dict[str, float] = field(default_factory=dict)
    _reports: dict[str, tuple[float, RouterReport]] = field(default_factory=dict)
    _services: dict[str, tuple[float, ServiceRecord]] = field(default_factory=dict)

    def put(self, record: ReplicaRecord, now_s: float) -> bool:
        """Store a replica's record and return whether the directory changed."""
        self._heard_s[record.replica_id] = now_s
        if self._records.get(record.replica_id) == record:
            return False
        self._records[record.replica_id] = record
        self._change += 1
        return True

    def fail(self, model: str, reason: str) -> None:
        """Record that a replica failed to start for a reason that would stop any other."""
        self._failures[model] = reason
        self._change += 1

    def begin_start(self) -> None:
        """Forget earlier failures and a shutdown, because applications are being deployed."""
        if self._failures or self._is_stopping:
            self._failures.clear()
            self._is_stopping = False
            self._change += 1

    def begin_stop(self) -> None:
        """Record that all applications are about to be deleted."""
        self._is_stopping = True
        self._change += 1

    def remove(self, replica_id: str) -> bool:
        """Remove a replica that is stopping and return whether it was known."""
        self._heard_s.pop(replica_id, None)
        if self._records.pop(replica_id, None) is None:
            return False
        self._change += 1
        return True

    def expire(self, now_s: float) -> bool:
        """Drop replicas without a heartbeat within their lease and return whether there were any."""
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
        """Store a router's report and return those of the others that reported within a lease."""
        self._reports[report.router_id] = (now_s, report)
        return tuple(other for other in self.reports(now_s) if other.router_id != report.router_id)

    def reports(self, now_s: float) -> tuple[RouterReport, ...]:
        """Return the latest report of every live router."""
        self._reports = {key: known for key, known in self._reports.items() if now_s - known[0] <= self.lease_s}
        return tuple(report for _, report in self._reports.values())

    def announce(self, record: ServiceRecord, now_s: float) -> None:
        """Store an OCR service's record."""
        self._services[record.service_id] = (now_s, record)

    def withdraw(self, service_id: str) -> None:
        """Remove an OCR service that accepts no more requests."""
        self._services.pop(service_id, None)

    def services(self, now_s: float) -> tuple[ServiceRecord, ...]:
        """Return the OCR services with a heartbeat within a lease, in a stable order."""
        self._services = {key: known for key, known in self._services.items() if now_s - known[0] <= self.lease_s}
        return tuple(record for _, (_, record) in sorted(self._services.items()))

    @property
    def snapshot(self) -> Snapshot:
        records = sorted(self._records.values(), key=lambda record: record.replica_id)
        failures = tuple(sorted(self._failures.items()))
        return Snapshot(
            version=(self.life, self._change), records=tuple(records), failures=failures, is_stopping=self._is_stopping
        )
