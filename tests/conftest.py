"""For all tests: how they are spread over processes, and what a run ends with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import Producer

pytest_plugins = ("support.databases",)
STACKS = "tests/e2e/"
SCRIPTED_STACKS = (
    *(f"{STACKS}test_{name}.py" for name in ("change", "faults", "keys_and_doors", "ledger", "ocr_death")),
    *(f"{STACKS}test_{name}.py" for name in ("ocr_services", "scaling", "stopping")),
    "tests/monitoring/test_discovery.py",
)
"""Files whose tests start stacks of scripted engines; the others share the one that the shipped settings start."""
_ENDS_THE_SHARED_STACK = "tests/e2e/test_lifecycle.py"
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


class LanesForStacks(LoadScopeScheduling):
    """Hands out tests by file, whose fixtures are costly, and the tests of whole stacks to two processes.

    One has those that share a stack, the other has those that start scripted ones, one after the other: tests of stacks
    mostly wait, but more stacks that start at once would overload a small machine.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(SCRIPTED_STACKS):
            return "scripted stacks"
        return STACKS if nodeid.startswith(STACKS) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LanesForStacks:
    config.option.loadscopereorder = False  # the order below is better than one by numbers of tests
    return LanesForStacks(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import heavy files that are not going to run: with what they import that takes longer than the rest."""
    if "not heavy" not in config.option.markexpr or collection_path.is_dir():
        return None
    return _is_heavy(collection_path.relative_to(config.rootpath).as_posix()) or None


def _is_heavy(nodeid: str) -> bool:
    return nodeid.startswith(HEAVY) and not nodeid.startswith(_LIGHT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is heavy. What takes longest begins first: files are handed out in this order."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        is_slow_database = callspec is not None and callspec.params.get("database_url") == "postgresql"
        if is_slow_database or _is_heavy(item.nodeid):
            item.add_marker(pytest.mark.heavy)
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[int, bool, bool]:
    room = next((rank for rank, room in enumerate(_ROOMS) if room in item.path.parts), len(_ROOMS))
    return room, item.nodeid.startswith(SCRIPTED_STACKS), item.nodeid.startswith(_ENDS_THE_SHARED_STACK)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        told = "; ".join(f"{reason} [{count}]" for reason, count in Counter(reasons).most_common())
        terminalreporter.section("not tested here", yellow=True)
        terminalreporter.write_line(f"{len(reasons)} skipped: {told}", yellow=True)
