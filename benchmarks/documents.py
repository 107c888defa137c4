"""The files in `benchmarks/results/`: one per benchmark, its figures and what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fastpath.rows import Row
from benchmarks.registry import BENCHMARKS

NAMES = frozenset({*(each.name for each in BENCHMARKS), "soak", "gpu"})
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Document:
    """What one benchmark has brought."""

    name: str
    about: Mapping[str, Any]
    """See `machine.describe_run`; `took_s` as well."""
    result: Any
    """A list of rows, or an object that may have them as `rows` beside other figures."""

    @property
    def rows(self) -> list[Row]:
        """Figures beside a peer's."""
        found = self.result.get("rows", []) if isinstance(self.result, dict) else self.result
        return [Row(**row) for row in found]


def read_document(file: Path) -> Document:
    """Raises OSError without the file, ValueError when it is none of ours."""
    try:
        given = json.loads(file.read_text())
        return Document(given["benchmark"], given["about"], given["result"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: is no result of a benchmark: {error!r}") from error


def read_documents(folder: Path = RESULTS) -> dict[str, Document]:
    """All of a folder, by the benchmark's name. Files that are called otherwise are somebody else's."""
    files = (file for file in sorted(folder.glob("*.json")) if file.stem in NAMES)
    return {document.name: document for document in map(read_document, files)}


def write_document(document: Document, folder: Path = RESULTS) -> Path:
    """Write it where `read_documents` looks."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{document.name}.json"
    content = {"benchmark": document.name, "about": dict(document.about), "result": document.result}
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
