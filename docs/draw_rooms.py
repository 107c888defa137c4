"""Draw the folders of `serving/` and what they import of one another, and refuse a loop between two of them.

    python docs/draw_rooms.py           # writes docs/rooms.md
    python docs/draw_rooms.py --check   # writes nothing; exit status 1 if the drawing is old, or a rule is broken

A node is a folder with the modules that lie directly in it. An arrow says that one of them imports something of the
other folder, at any level of the code: imports inside functions and for type checking count as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs/rooms.md"
PACKAGE = "serving"
MAX_ROOMS = 20
"""Folders and modules directly below `serving/`: more than this is not a layout but a list."""

Imports = Mapping[str, set[str]]
"""Which folders a folder imports from, itself left out."""


class RuleError(Exception):
    """A rule of the layout is broken; the text says which and where."""


def read_imports() -> Imports:
    """The imports of all folders below `serving/`, and of `serving/` itself."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    is_folder = {module: bool(graph.find_children(module)) for module in graph.modules}

    def folder_of(module: str) -> str:
        return module if is_folder[module] else module.rpartition(".")[0]

    found: dict[str, set[str]] = {folder_of(module): set() for module in graph.modules}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if folder_of(imported) != folder_of(module):
                found[folder_of(module)].add(folder_of(imported))
    return found


def check_rules(imports: Imports) -> None:
    """Check that no folders import one another in a loop, and that the rooms at the top are few.

    Raises:
        RuleError: a rule is broken.
    """
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        raise RuleError("folders import one another in a loop: " + " <- ".join(error.args[1])) from error
    rooms = {
        path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    rooms.discard("__init__")
    if len(rooms) > MAX_ROOMS:
        raise RuleError(f"serving/ has {len(rooms)} rooms, at most {MAX_ROOMS} are allowed: {', '.join(sorted(rooms))}")


def draw(imports: Imports) -> str:
    """The page: one diagram of the rooms at the top, one for each room that has folders of its own."""
    rooms = sorted({_room(folder, 1) for folder in imports if folder != PACKAGE})
    top = _diagram({room: {_room(name, 1) for name in _below(imports, room)} - {room, PACKAGE} for room in rooms})
    parts = [
        "# The rooms of serving/\n\nMade by `python docs/draw_rooms.py`; `make lint` fails when it is old, or when "
        f"folders import one another in a loop.\n\n{top}"
    ]
    for room in rooms:
        inner = {folder for folder in imports if folder == room or folder.startswith(f"{room}.")}
        if len(inner) > 2:
            parts.append(f"## {room}\n\n" + _diagram({folder: imports[folder] & inner for folder in sorted(inner)}))
    return "\n".join(parts)


def _room(folder: str, depth: int) -> str:
    return ".".join(folder.split(".")[: depth + 1])


def _below(imports: Imports, room: str) -> set[str]:
    return {to for folder in imports if folder == room or folder.startswith(f"{room}.") for to in imports[folder]}


def _diagram(imports: Imports) -> str:
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'  {folder}["{folder.rpartition(".")[2]}"]' for folder in sorted(imports)]
    lines += [f"  {folder} --> {other}" for folder in sorted(imports) for other in sorted(_reduce(imports, folder))]
    return "\n".join([*lines, "```\n"])


def _reduce(imports: Imports, folder: str) -> set[str]:
    """What a folder imports, without what one of those imports in turn: fewer arrows, and the same order."""
    reached: set[str] = set()
    for other in imports[folder]:
        todo = list(imports.get(other, ()))
        while todo:
            name = todo.pop()
            if name not in reached:
                reached.add(name)
                todo += imports.get(name, ())
    return imports[folder] - reached


def main() -> int:
    """Draw, or check the drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when the drawing is not up to date")
    options = parser.parse_args()
    imports = read_imports()
    try:
        check_rules(imports)
    except RuleError as error:
        print(f"docs/draw_rooms.py: {error}", file=sys.stderr)
        return 1
    page = draw(imports)
    if not options.check:
        DRAWING.write_text(page)
    elif not DRAWING.exists() or DRAWING.read_text() != page:
        print("docs/rooms.md is not what the code is: run python docs/draw_rooms.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
