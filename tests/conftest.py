"""For all tests: which of them share a process when several processes run them, and what a run ends with."""

from __future__ import annotations

from collections import Counter

import pytest

SHARED_STACK = "the shared stack"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Distribute tests by file, since fixtures of a module are costly; all that use the shared stack go together.

    pytest-xdist hands groups out in the order in which they were collected, so what takes longest comes first: the
    tests of whole stacks, which mostly wait, beside unit tests, which mostly compute.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        name = SHARED_STACK if "stack" in fixtures and "e2e" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: _rank(item.path.parts))


def _rank(parts: tuple[str, ...]) -> int:
    return next((rank for rank, room in enumerate(("e2e", "k8s", "monitoring", "unit")) if room in parts), 9)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        told = "; ".join(f"{reason} [{count}]" for reason, count in Counter(reasons).most_common())
        terminalreporter.section("not tested here", yellow=True)
        terminalreporter.write_line(f"{len(reasons)} skipped: {told}", yellow=True)
