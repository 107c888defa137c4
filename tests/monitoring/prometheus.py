"""A real Prometheus for tests, and questions to it."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

# CI installs it: there its absence is a failure, not a reason to skip.
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None and "CI" not in os.environ,
    reason="prometheus is not installed (apt-get install prometheus)",
)


@dataclass(frozen=True)
class Prometheus:
    url: str

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of now, each with its labels as `metric` and its `value`."""
        data = self._get("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def value(self, expression: str) -> float:
        """Of the only sample; 0 when there is none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else 0.0

    def healthy_targets(self) -> set[tuple[str, str]]:
        """Job and address of those that were scraped last time."""
        active = self._get("targets", state="active")["activeTargets"]
        return {
            (target["labels"]["job"], target["labels"]["instance"]) for target in active if target["health"] == "up"
        }

    def wait_for(self, is_so: Callable[[], object], timeout_s: float, what: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
            time.sleep(0.3)
