"""What a run says of tests that were skipped."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

TESTS = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_of_a_database(n):
    pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")

@pytest.mark.skipif(True, reason="promtool is not installed (apt-get install prometheus)")
def test_of_rules(): ...

def test_that_runs(): ...
"""


def run_tests(folder: Path, text: str) -> str:
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "/dev/null", "--rootdir"]
    run = subprocess.run(
        [*command, folder, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},  # as in pyproject's pythonpath, which is not read here
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_a_run_ends_with_what_was_skipped_and_what_to_install(tmp_path: Path) -> None:
    assert (
        "4 skipped: PostgreSQL is not installed (apt-get install postgresql) [3]; "
        "promtool is not installed (apt-get install prometheus) [1]\n"
    ) in run_tests(tmp_path, TESTS)


def test_a_run_in_which_nothing_was_skipped_says_nothing_of_it(tmp_path: Path) -> None:
    assert "not tested here" not in run_tests(tmp_path, "def test_that_runs(): ...")


def find_reasons(file: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    skips = [call for call in calls if ast.unparse(call.func) == "pytest.skip"]
    conditions = [call for call in calls if ast.unparse(call.func) == "pytest.mark.skipif"]
    given = [call.args[0] for call in skips]
    given += [keyword.value for call in conditions for keyword in call.keywords if keyword.arg == "reason"]
    return [ast.unparse(reason).strip("f'\"") for reason in given]


def test_every_reason_says_how_to_have_it() -> None:
    found = [reason for file in (ROOT / "tests").rglob("*.py") for reason in find_reasons(file)]
    assert len(found) > 5
    assert [reason for reason in found if not reason.endswith(")")] == []
