"""What a bulk run writes: a result for each file, and a report of all of them."""

from __future__ import annotations

import base64
import csv
import importlib.metadata
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from serving.ocr_api.options import PageFormat
from serving.ocr_api.shapes import OcrPage

REPORT_NAME = "report.csv"
REPORT_COLUMNS = ("path", "result", "status", "pages", "failed_pages", "model", "mode", "tokens", "cost_dollars",
                  "seconds", "sha256", "error")  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What spreadsheets take for the beginning of a formula."""


class OutputFormat(StrEnum):
    MARKDOWN = "markdown"
    TEXT = "text"
    JSON = "json"
    HTML = "html"
    HOCR = "hocr"
    ALTO = "alto"
    PDF = "pdf"

    @property
    def suffix(self) -> str:
        suffixes = {"markdown": ".md", "text": ".txt", "alto": ".alto.xml", "hocr": ".hocr"}
        return suffixes.get(self.value, f".{self.value}")

    @property
    def page_format(self) -> PageFormat:
        """The format of pages that the file is made from."""
        formats: dict[str, PageFormat] = {"json": "layout", "markdown": "markdown", "text": "text"}
        formats |= {"html": "html", "hocr": "hocr", "alto": "alto", "pdf": "pdf"}
        return formats[self.value]


@dataclass(frozen=True, slots=True)
class ResultFacts:
    """What a result says about its document."""

    path: str
    """As it was given, for display."""
    num_pages: int | None
    """Pages of the document, read or not."""
    model: str
    revision: str | None
    """Of the model's checkpoint; None if the service does not tell it."""
    digest: str
    """SHA-256 of the document."""


def render(kind: OutputFormat, facts: ResultFacts, pages: Sequence[OcrPage]) -> bytes:
    """The content of a result file. Text pages are separated by form feeds, as in pdftotext; markdown by comments."""
    if kind is OutputFormat.PDF:
        return _join_pdfs(pages)
    if kind in _BODIES:
        return _join_documents(kind, pages).encode()
    return _render_text(kind, facts, pages).encode()


_BODIES = {
    OutputFormat.HTML: ("<body>\n", "</body>"),
    OutputFormat.HOCR: ("<body>\n", "</body>"),
    OutputFormat.ALTO: ("<Layout>\n", "</Layout>"),
}
"""Between what the pages of a document stand, in the documents that the service makes of single pages."""


def _join_documents(kind: OutputFormat, pages: Sequence[OcrPage]) -> str:
    """One document of those of the pages. Pages that failed are named in a comment."""
    start, end = _BODIES[kind]
    bodies: list[str] = []
    head, tail = "", ""
    for page in pages:
        before, found, rest = page.content.partition(start)
        body, _, after = rest.rpartition(end)
        if page.is_completed and found:
            head, tail = head or before + found, tail or end + after
            bodies.append(body)
        else:
            bodies.append(f"<!-- page {page.number} could not be read: {_explain(page)} -->\n")
    return head + "".join(bodies) + tail


def _join_pdfs(pages: Sequence[OcrPage]) -> bytes:
    """One PDF of those of the pages that were read."""
    import pikepdf

    joined, out = pikepdf.new(), io.BytesIO()
    for page in pages:
        if page.pdf_base64 is not None:
            with pikepdf.open(io.BytesIO(base64.b64decode(page.pdf_base64))) as single:
                joined.pages.extend(single.pages)
    joined.save(out, deterministic_id=True)
    return out.getvalue()


def _explain(page: OcrPage) -> str:
    return (page.error.message if page.error is not None else "").replace("--", "- -")


def _render_text(kind: OutputFormat, facts: ResultFacts, pages: Sequence[OcrPage]) -> str:
    if kind is OutputFormat.JSON:
        return _render_json(facts, pages)
    if kind is OutputFormat.TEXT:
        return "\f".join(f"{page.content}\n" for page in pages)
    parts = []
    for page in pages:
        if not page.is_completed:
            parts.append(f"<!-- page {page.number} could not be read: {_explain(page)} -->\n")
        else:
            head = f"<!-- page {page.number} -->\n\n" if len(pages) > 1 else ""
            parts.append(f"{head}{page.content}\n")
    return "\n".join(parts)


def _render_json(facts: ResultFacts, pages: Sequence[OcrPage]) -> str:
    modes = list(dict.fromkeys(page.mode for page in pages if page.mode is not None))
    result = {
        "path": facts.path,
        "num_pages": facts.num_pages,
        "model": facts.model,
        "mode": modes[0] if len(modes) == 1 else modes or None,
        "checkpoint_revision": facts.revision,
        "sha256": facts.digest,
        "versions": {"serving": importlib.metadata.version("serving")},
        "estimated_cost": round(sum(page.usage.estimated_cost for page in pages), 9),
        "pages": [page.model_dump(mode="json", exclude={"seq"}, exclude_none=True) for page in pages],
    }
    return json.dumps(result, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A file in the report."""

    path: str
    result: str
    status: str
    """`read`, `failed`, or `unreadable` for what could not even be opened."""
    num_pages: int = 0
    """Pages that were read."""
    num_failed: int = 0
    model: str = ""
    mode: str = ""
    num_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0
    digest: str = ""
    error: str = ""


def write_report(file: Path, rows: Iterable[ReportRow]) -> None:
    """Write the report as CSV, with one line per file; raises OSError when it cannot be written."""
    half = file.with_name(f".{file.name}.half")
    with half.open("w", encoding="utf-8", newline="") as out:
        _write_rows(out, rows)
    half.replace(file)


def _write_rows(out: TextIO, rows: Iterable[ReportRow]) -> None:
    writer = csv.writer(out)
    writer.writerow(REPORT_COLUMNS)
    for row in rows:
        numbers = (row.num_tokens, f"{row.dollars:.9f}", f"{row.seconds:.2f}")
        texts = map(_disarm, (row.path, row.result))
        writer.writerow(
            (*texts, row.status, row.num_pages, row.num_failed, row.model, row.mode, *numbers, row.digest,
             _disarm(row.error))
        )  # fmt: skip


def _disarm(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
