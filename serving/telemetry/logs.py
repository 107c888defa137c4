"""Logging: one JSON object per line on stderr, and one line for every finished request.

A request's line contains its tenant, model, outcome and duration. It never contains a prompt, an answer, an image or a
key, because the record that it is made from contains none of them.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from serving.billing.records import RequestRecord
from serving.settings.telemetry import LogSettings

_ROOT = "serving"
_NS_PER_MS = 1_000_000
_requests = logging.getLogger("serving.requests")


def configure_logs(settings: LogSettings) -> None:
    """Configure our loggers in this process; those of libraries are unchanged. It may be called again."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.format_exc_info,
    ]
    renderer = structlog.processors.JSONRenderer() if settings.format == "json" else structlog.dev.ConsoleRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logger = logging.getLogger(_ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(settings.level.upper())
    logger.propagate = False
    _requests.setLevel(logging.NOTSET if settings.requests else logging.CRITICAL)


def log_request(record: RequestRecord) -> None:
    """Log the line of a finished request; it costs next to nothing when the level is disabled."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    _requests.info(
        "request",
        extra={
            "request_id": record.request_id,
            "tenant": record.tenant_id,
            "key_id": record.key_id,
            "route": record.route,
            "model": record.model,
            "outcome": str(record.outcome),
            "status": record.status,
            "error": record.error_code,
            "pages": record.num_pages,
            "prompt_tokens": record.tokens.num_prompt_tokens,
            "completion_tokens": record.tokens.num_completion_tokens,
            "replica": record.replica_id,
            "tries": record.num_tries,
            "queue_ms": record.queue_wait_ns // _NS_PER_MS,
            "first_byte_ms": max(0, record.first_byte_ns - record.arrived_ns) // _NS_PER_MS,
            "total_ms": (record.ended_ns - record.arrived_ns) // _NS_PER_MS,
        },
    )
