"""For all tests: a run ends with what was skipped, and with what to install to have it."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        told = "; ".join(f"{reason} [{count}]" for reason, count in Counter(reasons).most_common())
        terminalreporter.section("not tested here", yellow=True)
        terminalreporter.write_line(f"{len(reasons)} skipped: {told}", yellow=True)
