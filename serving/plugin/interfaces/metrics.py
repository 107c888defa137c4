"""Metrics of the plugin, in the default registry of the API process, which vLLM's `/metrics` shows."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

QUEUE_PAGES = Gauge("serving_image_queue_pages", "Pages waiting for an image worker.", multiprocess_mode="livesum")
PAGES = Counter("serving_image_pages_total", "Pages made into model-ready pixels, by resolution mode.", ["mode"])
FAILURES = Counter(
    "serving_image_failures_total",
    "Pages that were not: invalid data, no room in the queue (full), no worker (unavailable), lost with theirs (lost).",
    ["reason"],
)
QUEUE_SECONDS = Histogram("serving_image_queue_seconds", "Time a page waits for an image worker.", buckets=_SECONDS)
WORK_SECONDS = Histogram(
    "serving_image_work_seconds", "Time from a page's start in a worker or thread to its pixels.", buckets=_SECONDS
)
WORKER_RESTARTS = Counter("serving_image_worker_restarts_total", "Image workers replaced after they died or hung.")

REPETITION_STOPS = Counter("serving_repetition_stops_total", "Answers that the loop stop cut.")
WASTED_TOKENS = Counter("serving_wasted_tokens_total", "Tokens generated for nothing, by reason.", ["reason"])
WASTED_TOKENS.labels("repetition")  # shown from the start, as a counter has to be for its first increase to count
