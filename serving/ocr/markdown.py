"""Blocks to markdown or plain text. Pure; never raises, whatever a model wrote."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.ocr.layout import Block, Box

_HEADINGS = {"title": "# ", "sub_title": "## "}
"""Labels of the published model; it mostly writes the number signs itself."""
_FIGURES = frozenset({"image", "figure"})
_TABLE = re.compile(r"<table\b[^<>]*>.*?(?:</table\s*>|\Z)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<(/?)(tr|td|th)\b([^<>]*)>|</?(?:table|thead|tbody|tfoot)\b[^<>]*>", re.IGNORECASE)
_SPAN = re.compile(r"\b(colspan|rowspan)\s*=\s*[\"']?(\d{1,3})(?!\d)", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n{3,}")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    """Without markup's escapes, on one line."""
    columns: int = 1
    rows: int = 1
    is_head: bool = False


Table = list[list[Cell]]


def render_markdown(blocks: Sequence[Block], name_figure: Callable[[int, Box | None], str | None] | None = None) -> str:
    """One page.

    Args:
        blocks: in the order of reading.
        name_figure: from a figure, counted from 0 on the page, and its box to its address; one without is left out.
    """
    parts: list[str] = []
    num_figures = 0
    for block in blocks:
        label = block.label.lower()
        if label in _FIGURES and name_figure is not None:
            address = name_figure(num_figures, block.boxes[0] if block.boxes else None)
            parts.extend([f"![]({address})"] if address else ())
            num_figures += 1
        if block.text:
            needs_sign = label in _HEADINGS and not block.text.startswith("#")
            parts.append((_HEADINGS[label] if needs_sign else "") + format_tables(block.text))
    return _BLANK_LINES.sub("\n\n", "\n\n".join(parts)).strip()


def render_text(blocks: Sequence[Block]) -> str:
    """One page without any markup; the cells of a table's row have a tab between them."""
    texts = (_TABLE.sub(lambda found: _to_lines(read_table(found.group())), block.text) for block in blocks)
    return _BLANK_LINES.sub("\n\n", "\n\n".join(text for text in texts if text)).strip()


def format_tables(text: str) -> str:
    """Every `<table>` as a markdown table, or as plain HTML when cells span several rows or columns, which markdown
    cannot say. A table that was cut off is closed."""
    return _TABLE.sub(lambda found: f"\n\n{_format_table(read_table(found.group()))}\n\n", text).strip()


def read_table(markup: str) -> Table:
    """Rows of cells. Whatever is not inside a cell is left out, tags that are not closed end with the next."""
    table: Table = []
    cell: Cell | None = None
    start = 0
    for tag in _TAG.finditer(markup):
        if cell is not None:
            _add_cell(table, cell, markup[start : tag.start()])
            cell = None
        name = (tag.group(2) or "").lower()
        if tag.group(1) or not name:
            continue
        if name == "tr":
            table.append([])
            continue
        spans = {key.lower(): max(1, int(count)) for key, count in _SPAN.findall(tag.group(3))}
        cell, start = Cell("", spans.get("colspan", 1), spans.get("rowspan", 1), name == "th"), tag.end()
    if cell is not None:
        _add_cell(table, cell, markup[start:])
    return [row for row in table if row]


def _add_cell(table: Table, cell: Cell, markup: str) -> None:
    text = _SPACE.sub(" ", html.unescape(markup)).strip()
    if not table:
        table.append([])
    table[-1].append(Cell(text, cell.columns, cell.rows, cell.is_head))


def _format_table(table: Table) -> str:
    if any(cell.columns > 1 or cell.rows > 1 for row in table for cell in row):
        return _to_html(table)
    if not table:
        return ""
    num_columns = max(map(len, table))
    lines = [
        "| " + " | ".join([_escape(cell.text) for cell in row] + [""] * (num_columns - len(row))) + " |"
        for row in table
    ]
    return "\n".join([lines[0], "|" + " --- |" * num_columns, *lines[1:]])


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _to_html(table: Table) -> str:
    rows = ("<tr>" + "".join(map(_cell_to_html, row)) + "</tr>" for row in table)
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _cell_to_html(cell: Cell) -> str:
    name = "th" if cell.is_head else "td"
    columns = f' colspan="{cell.columns}"' if cell.columns > 1 else ""
    rows = f' rowspan="{cell.rows}"' if cell.rows > 1 else ""
    return f"<{name}{columns}{rows}>{html.escape(cell.text, quote=False)}</{name}>"


def _to_lines(table: Table) -> str:
    return "\n".join("\t".join(cell.text for cell in row) for row in table)
