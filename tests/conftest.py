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
    """What takes longest begins first: files are handed out in this order."""
    items.sort(key=lambda item: _rank(item.path))


def _rank(file: Path) -> int:
    return next((rank for rank, room in enumerate(_ROOMS) if room in file.parts), len(_ROOMS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        told = "; ".join(f"{reason} [{count}]" for reason, count in Counter(reasons).most_common())
        terminalreporter.section("not tested here", yellow=True)
        terminalreporter.write_line(f"{len(reasons)} skipped: {told}", yellow=True)
