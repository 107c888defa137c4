"""One name, one thing: no two public classes of `serving` share a name."""

from __future__ import annotations

import ast
from collections import defaultdict

from support.paths import ROOT


def test_a_class_name_occurs_once() -> None:
    files = defaultdict(list)
    for file in sorted((ROOT / "serving").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(str(file.relative_to(ROOT)))
    assert {name: found for name, found in files.items() if len(found) > 1} == {}
