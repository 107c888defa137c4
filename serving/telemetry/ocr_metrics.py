"""The metrics of an OCR service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from serving.telemetry import catalogue
from serving.telemetry.router_metrics import Reading, StateCollector, build_metric


class OcrMetrics:
    """Counters are updated as events happen; gauges are read at each scrape."""

    def __init__(self, read_gauges: Callable[[], Iterator[Reading]]) -> None:
        self._registry = CollectorRegistry()
        self._pages: Any = build_metric(catalogue.OCR_PAGES, self._registry)
        self._retries: Any = build_metric(catalogue.OCR_PAGE_RETRIES, self._registry)
        self._documents: Any = build_metric(catalogue.OCR_DOCUMENTS, self._registry)
        self._refusals: Any = build_metric(catalogue.OCR_REFUSALS, self._registry)
        self._render: Any = build_metric(catalogue.OCR_RENDER, self._registry)
        self._page: Any = build_metric(catalogue.OCR_PAGE, self._registry)
        self._warnings: Any = build_metric(catalogue.OCR_WARNINGS, self._registry)
        self._registry.register(StateCollector([read_gauges]))

    def see_document(self, form: str, way: str) -> None:
        """Count an accepted document; `way` is request, stream or job."""
        self._documents.labels(form, way).inc()

    def see_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def see_render(self, seconds: float) -> None:
        self._render.observe(seconds)

    def see_page(self, *, is_failed: bool, num_retries: int, seconds: float, mode: str) -> None:
        """Count a finished page; `mode` is one of a few."""
        self._pages.labels("failed" if is_failed else "completed", mode).inc()
        if num_retries:
            self._retries.inc(num_retries)
        self._page.observe(seconds)

    def see_warning(self, kind: str) -> None:
        """Count a warning on a finished page."""
        self._warnings.labels(kind).inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
