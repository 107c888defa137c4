"""Lines and branches that the last run with `--cov` reached, by room, and the files with most that it did not.

    python -m tests.support.coverage_by_room

What runs inside an engine's compiled code, on a GPU, or in a process that is killed, is not seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

NUM_FILES = 15
_FIGURES = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", file, "--ignore-errors"], check=True)
        files = {name: found["summary"] for name, found in json.loads(file.read_text())["files"].items()}
    console = Console()
    console.print(build_rooms(files))
    console.print(build_gaps(files))


def build_rooms(files: dict[str, dict[str, int]]) -> Table:
    """Each room, and all together."""
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for name, summary in files.items():
        parts = Path(name).parts
        room = "/".join(parts[1:3]) if len(parts) > 3 else parts[1]
        for key in _FIGURES:
            rooms[room][key] += summary[key]
            rooms["all"][key] += summary[key]
    table = Table(title="Covered, by room")
    table.add_column("room")
    for column in ("lines", "of", "%", "branches", "of", "%"):
        table.add_column(column, justify="right")
    for room, found in sorted(rooms.items(), key=lambda item: (item[0] == "all", item[0])):
        lines, reached, branches, taken = (found[key] for key in _FIGURES)
        table.add_row(
            room, str(reached), str(lines), _share(reached, lines), str(taken), str(branches), _share(taken, branches)
        )
    return table


def build_gaps(files: dict[str, dict[str, int]]) -> Table:
    """The files with most lines that were not reached."""
    missing = sorted(files, key=lambda name: files[name]["covered_lines"] - files[name]["num_statements"])[:NUM_FILES]
    table = Table(title="Most lines not reached")
    table.add_column("file")
    table.add_column("lines", justify="right")
    for name in missing:
        table.add_row(name, str(files[name]["num_statements"] - files[name]["covered_lines"]))
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else "-"


if __name__ == "__main__":
    main()
