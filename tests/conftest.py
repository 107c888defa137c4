"""For all tests: how they are spread over processes, and what a run ends with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import Producer

pytest_plugins = ("support.databases",)
STACKS = "tests/e2e/"
_ROOMS = ("e2e", "k8s", "monitoring", "unit")
HEAVY = (
    *("tests/e2e/", "tests/k8s/", "tests/monitoring/", "tests/unit/benchmarks/", "tests/unit/nano/", "tests/unit/ocr/"),
    *("tests/unit/planning/", "tests/unit/plugin/images/test_pool", "tests/unit/plugin/images/test_worker"),
    *("tests/unit/plugin/model/", "tests/unit/requirements/", "tests/unit/web/test_playground"),
    *("tests/unit/billing/test_ledger", "tests/unit/cli/test_ocr", "tests/unit/cli/test_plan"),
    *("tests/unit/engine/test_replica", "tests/unit/engine/test_serve_log", "tests/unit/router/lookups/test_openapi"),
    *("tests/unit/stack/test_supervisor", "tests/unit/test_skips"),
)
"""What starts servers, browsers or other processes, or computes for seconds: marked `heavy`."""
_LIGHT = ("tests/unit/ocr/text/", "tests/unit/ocr/limits/test_shares", "tests/unit/ocr/limits/test_turns")


class OneLaneForStacks(LoadScopeScheduling):
    """Hands out tests by file, whose fixtures are costly, and all tests of whole stacks to one process.

    Those share a stack, mostly wait, and would overload a small machine if several processes started stacks at once.
    """

    def _split_scope(self, nodeid: str) -> str:
        return STACKS if nodeid.startswith(STACKS) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneLaneForStacks:
    config.option.loadscopereorder = False  # the order below is better than one by numbers of tests
    return OneLaneForStacks(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is heavy. What takes longest begins first: files are handed out in this order."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        is_slow_database = callspec is not None and callspec.params.get("database_url") == "postgresql"
        if is_slow_database or (item.nodeid.startswith(HEAVY) and not item.nodeid.startswith(_LIGHT)):
            item.add_marker(pytest.mark.heavy)
    items.sort(key=lambda item: _rank(item.path))


def _rank(file: Path) -> int:
    return next((rank for rank, room in enumerate(_ROOMS) if room in file.parts), len(_ROOMS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        told = "; ".join(f"{reason} [{count}]" for reason, count in Counter(reasons).most_common())
        terminalreporter.section("not tested here", yellow=True)
        terminalreporter.write_line(f"{len(reasons)} skipped: {told}", yellow=True)
