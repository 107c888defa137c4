"""The metrics of a router: counters from the records of finished requests, gauges read from its state at a scrape."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.billing.records import Outcome, RequestRecord
from serving.telemetry import catalogue
from serving.telemetry.catalogue import Metric, MetricKind

_NANO = 10**9

Reading = tuple[Metric, tuple[str, ...], float]
"""A gauge or counter, the values of its labels, and its current value."""

ReadState = Callable[[], Iterable[Reading]]
"""Called at every scrape. The values of a counter must never decrease during the life of the process."""


def build_metric(metric: Metric, registry: CollectorRegistry) -> Any:
    """Create prometheus-client's counter or histogram for an entry of the catalogue."""
    if metric.kind is MetricKind.COUNTER:
        return Counter(metric.name, metric.help, metric.labels, registry=registry)
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)


class RouterMetrics:
    """The metrics of one router process, with a registry of their own."""

    def __init__(self, *sources: ReadState) -> None:
        """Create the registry.

        Args:
            sources: functions that return further values.
        """
        self._registry = CollectorRegistry()
        self._requests = build_metric(catalogue.REQUESTS, self._registry)
        self._tokens = build_metric(catalogue.TOKENS, self._registry)
        self._pages = build_metric(catalogue.PAGES, self._registry)
        self._cost = build_metric(catalogue.COST, self._registry)
        self._first_token = build_metric(catalogue.FIRST_TOKEN, self._registry)
        self._between_tokens = build_metric(catalogue.BETWEEN_TOKENS, self._registry)
        self._whole_request = build_metric(catalogue.WHOLE_REQUEST, self._registry)
        self._queue_wait = build_metric(catalogue.QUEUE_WAIT, self._registry)
        self._retries = build_metric(catalogue.RETRIES, self._registry)
        self._refusals = build_metric(catalogue.REFUSALS, self._registry)
        self._state = StateCollector(list(sources))
        self._registry.register(self._state)

    def add(self, source: ReadState) -> None:
        """Add another source of values. Two sources must not return the same metric with the same labels."""
        self._state.sources.append(source)

    def count(self, record: RequestRecord) -> None:
        """Count the record of a finished request."""
        tenant, model = record.tenant_id, record.model
        self._requests.labels(record.route, tenant, model, record.outcome, str(record.status)).inc()
        if record.outcome is Outcome.REFUSED:
            self._refusals.labels(tenant, record.error_code).inc()
            return
        self._count_tokens(record)
        self._cost.labels(tenant, model).inc(record.cost_nanodollars / _NANO)
        self._queue_wait.labels(model, record.priority).observe(record.queue_wait_ns / _NANO)
        if record.num_tries > 1:
            self._retries.labels(model).inc(record.num_tries - 1)
        if record.outcome is Outcome.COMPLETED:
            self._observe_times(record)
            for mode in record.modes or ("unknown",) * record.num_pages:
                self._pages.labels(tenant, model, mode).inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _count_tokens(self, record: RequestRecord) -> None:
        tokens = record.tokens
        for kind, number in (
            ("prompt", tokens.num_prompt_tokens),
            ("image", tokens.num_image_tokens),
            ("cached", tokens.num_cached_tokens),
            ("completion", tokens.num_completion_tokens),
            ("wasted", record.num_wasted_tokens),
        ):
            if number:
                self._tokens.labels(record.tenant_id, record.model, kind).inc(number)

    def _observe_times(self, record: RequestRecord) -> None:
        self._whole_request.labels(record.model, record.priority).observe((record.ended_ns - record.arrived_ns) / _NANO)
        if not record.is_stream:
            return
        self._first_token.labels(record.model).observe((record.first_byte_ns - record.arrived_ns) / _NANO)
        num_gaps = record.tokens.num_completion_tokens - 1
        if num_gaps > 0:
            lasted_ns = record.ended_ns - record.first_byte_ns
            self._between_tokens.labels(record.model).observe(lasted_ns / num_gaps / _NANO)


class StateCollector(Collector):
    """Calls its sources at each scrape, and exports the build's version."""

    def __init__(self, sources: list[ReadState]) -> None:
        self.sources = sources
        versions = tuple(importlib.metadata.version(name) for name in ("serving", "ray"))
        self._build: Reading = (catalogue.BUILD, versions, 1.0)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for metric, values, value in (self._build, *(reading for read in self.sources for reading in read())):
            family = families.get(metric.name)
            if family is None:
                kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
                family = families[metric.name] = kind(metric.name, metric.help, labels=metric.labels)
            family.add_metric(values, value)
        yield from families.values()
