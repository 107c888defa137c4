"""A router's current state for operators, as JSON and as gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from serving.cluster.directory import Snapshot
from serving.router.access.limits import TenantLimits
from serving.router.scheduling.circuit_breaker import BreakerState
from serving.router.scheduling.dispatcher import Dispatcher
from serving.telemetry import catalogue
from serving.telemetry.router_metrics import Reading

_BREAKER_VALUES = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 1.0, BreakerState.OPEN: 2.0}


@dataclass(frozen=True, slots=True)
class RouterState:
    """Read-only."""

    router_id: str
    read_snapshot: Callable[[], Snapshot]
    dispatcher: Dispatcher
    limits: TenantLimits

    def describe(self) -> dict[str, Any]:
        """What an operator looks at first when something is slow."""
        work = self.dispatcher.replica_work()
        breakers = self.dispatcher.breaker_states()
        return {
            "router_id": self.router_id,
            "replicas": [
                {
                    "replica_id": record.replica_id,
                    "model": record.model,
                    "state": record.state,
                    "base_url": record.base_url,
                    "capacity_tokens": record.capacity_tokens,
                    "work_tokens": work.get(record.replica_id, 0),
                    "breaker": breakers.get(record.replica_id, BreakerState.CLOSED),
                }
                for record in self.read_snapshot().records
            ],
            "queues": [
                {"model": model, "priority": priority, "requests": length}
                for (model, priority), length in self.dispatcher.queue_lengths().items()
            ],
            "tenants": {
                name: {
                    "requests": round(use.num_requests, 1),
                    "tokens": use.num_tokens,
                    "running": use.num_running,
                    "documents": use.num_documents,
                    "lookups": use.num_lookups,
                }
                for name, use in self.limits.uses()
            },
        }

    def read_gauges(self) -> Iterator[Reading]:
        """The catalogue's gauges."""
        for (model, priority), length in self.dispatcher.queue_lengths().items():
            yield catalogue.QUEUE_REQUESTS, (model, priority), float(length)
        queued = self.dispatcher.queued_work()
        for model in {model for model, _ in self.dispatcher.queue_lengths()}:
            yield catalogue.QUEUE_WORK, (model,), float(queued.get(model, 0))
        records = self.read_snapshot().records
        for (model, state), number in Counter((record.model, record.state) for record in records).items():
            yield catalogue.REPLICAS, (model, state), float(number)
        work = self.dispatcher.replica_work()
        breakers = self.dispatcher.breaker_states()
        for record in records:
            labels = (record.model, record.replica_id)
            yield catalogue.REPLICA_WORK, labels, float(work.get(record.replica_id, 0))
            yield catalogue.BREAKERS, labels, _BREAKER_VALUES[breakers.get(record.replica_id, BreakerState.CLOSED)]
