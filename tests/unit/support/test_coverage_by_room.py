from __future__ import annotations

from rich.console import Console
from support.coverage_by_room import build_gaps, build_rooms


def summary(statements: int, covered: int, branches: int = 0, taken: int = 0) -> dict[str, int]:
    return {
        "num_statements": statements,
        "covered_lines": covered,
        "num_branches": branches,
        "covered_branches": taken,
    }


def test_rooms_add_up_and_gaps_come_largest_first() -> None:
    files = {
        "serving/errors.py": summary(10, 10),
        "serving/http/bodies.py": summary(40, 30, 8, 4),
        "serving/http/reply.py": summary(10, 10, 2, 2),
        "serving/ocr/jobs/store.py": summary(50, 20),
    }
    console = Console(width=100, record=True, file=None, quiet=False)
    console.print(build_rooms(files))
    console.print(build_gaps(files))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert ["http", "40", "50", "80", "6", "10", "60"] in rows
    assert ["ocr/jobs", "20", "50", "40", "0", "0", "-"] in rows
    assert ["all", "70", "110", "64", "6", "10", "60"] in rows
    assert [row[0] for row in rows if len(row) == 2][:2] == ["serving/ocr/jobs/store.py", "serving/http/bodies.py"]
