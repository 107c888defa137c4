"""The plugin's metrics, in the default registry of the API process, which vLLM's `/metrics` exports."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

QUEUE_PAGES = Gauge("serving_image_queue_pages", "Pages waiting for an image worker.", multiprocess_mode="livesum")
PAGES = Counter("serving_image_pages_total", "Pages converted to views for the model, by resolution mode.", ["mode"])
FAILURES = Counter(
    "serving_image_failures_total",
    "Pages that were not converted: invalid data, queue full, no worker (unavailable), worker died (lost).",
    ["reason"],
)
QUEUE_SECONDS = Histogram("serving_image_queue_seconds", "Time a page waits for an image worker.", buckets=_SECONDS)
WORK_SECONDS = Histogram(
    "serving_image_work_seconds", "Time that a worker or thread takes to convert a page.", buckets=_SECONDS
)
WORKER_RESTARTS = Counter("serving_image_worker_restarts_total", "Image workers replaced after they died or hung.")

REPETITION_STOPS = Counter("serving_repetition_stops_total", "Answers that the loop stop cut.")
WASTED_TOKENS = Counter("serving_wasted_tokens_total", "Tokens generated for nothing, by reason.", ["reason"])
WASTED_TOKENS.labels("repetition")  # exported from the start: otherwise `increase` misses the first increment
