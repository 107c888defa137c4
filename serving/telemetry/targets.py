"""The scrape targets, in the format that Prometheus' HTTP and file service discovery share.

Target labels must not occur in the metrics: routers' metrics have the labels `model` and `replica` of the engines they
describe, so a router's target has the label `router`.
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
    """Return the listening engines, including draining ones, the routers and the OCR services, in a stable order."""
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
    """The file for Prometheus' `file_sd_configs`, replaced atomically whenever the targets change."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written = b""

    def write(self, groups: list[Group]) -> bool:
        """Write the file unless this process last wrote the same text. Return whether it was written.

        Raises:
            OSError: the file cannot be written.
        """
        content = orjson.dumps(groups, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        if content == self._written:
            return False
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # The temporary name must not match Prometheus' pattern (*.json), nor be that of another router's file.
        handle, name = tempfile.mkstemp(prefix=f".{self._file.name}.", suffix=".new", dir=self._file.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
            Path(name).chmod(0o644)  # Prometheus runs as another user
            Path(name).replace(self._file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        self._written = content
        return True
