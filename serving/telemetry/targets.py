"""What Prometheus is to scrape, in the shape that its HTTP and file service discovery share.

A target's own labels are those that its metrics don't carry: routers' metrics have `model` and `replica` of the engines
that they tell of, so a router is known by `router`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from serving.cluster.directory import RouterReport, ServiceRecord, Snapshot

Group = dict[str, list[str] | dict[str, str]]
"""`{"targets": ["host:port"], "labels": {...}}`"""


def list_targets(
    snapshot: Snapshot, reports: Iterable[RouterReport], services: Iterable[ServiceRecord] = ()
) -> list[Group]:
    """Engines that listen, draining ones too, routers and OCR services; in an order that only changes when they do."""
    engines = [
        _group(record.base_url, {"job": "engine", "model": record.model, "replica": record.replica_id})
        for record in sorted(snapshot.records, key=lambda record: record.replica_id)
        if record.base_url
    ]
    routers = [
        _group(report.metrics_url, {"job": "router", "router": report.router_id})
        for report in sorted(reports, key=lambda report: report.router_id)
        if report.metrics_url
    ]
    ocr = [
        _group(record.metrics_url, {"job": "ocr", "service": record.service_id})
        for record in sorted(services, key=lambda record: record.service_id)
        if record.metrics_url
    ]
    return routers + engines + ocr


def render_targets(groups: list[Group]) -> bytes:
    return orjson.dumps(groups)


def _group(url: str, labels: dict[str, str]) -> Group:
    parts = urlsplit(url)
    if parts.scheme != "http":
        labels = {**labels, "__scheme__": parts.scheme}
    return {"targets": [parts.netloc], "labels": labels}


class TargetsFile:
    """The same for Prometheus' `file_sd_configs`: written when the list has changed, whole or not at all."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written = b""

    def write(self, groups: list[Group]) -> bool:
        """Write it if this process has not written the same before; says whether it did.

        Raises:
            OSError: it cannot be written.
        """
        content = orjson.dumps(groups, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        if content == self._written:
            return False
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # Of a name that Prometheus' pattern (*.json) does not match, and not the one of another router's.
        handle, name = tempfile.mkstemp(prefix=f".{self._file.name}.", suffix=".new", dir=self._file.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
            Path(name).chmod(0o644)  # Prometheus is another user
            Path(name).replace(self._file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        self._written = content
        return True
