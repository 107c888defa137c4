"""Renders blocks as markdown or plain text. Pure; never raises, whatever the model wrote."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

from serving.ocr.text.layout import Box, LayoutBlock
from serving.ocr.text.tables import Cell, Table, split_tables, strip_markup

_HEADINGS = {"title": "# ", "sub_title": "## "}
"""Labels of the published model, which mostly writes the number signs itself."""
_FIGURES = frozenset({"image", "figure"})
_BLANK_LINES = re.compile(r"\n{3,}")
_TAG_LIKE = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY_LIKE = re.compile(r"&(?=#?\w+;)")


def render_markdown(
    blocks: Sequence[LayoutBlock],
    name_figure: Callable[[int, Box | None], str | None] | None = None,
    *,
    is_html: bool = False,
) -> str:
    """The markdown of one page.

    Args:
        blocks: in reading order.
        name_figure: returns the address of a figure, given its number on the page, counted from 0, and its box.
            Figures for which it returns None are left out.
        is_html: keep all tables as HTML.
    """
    parts: list[str] = []
    num_figures = 0
    for block in blocks:
        label = block.label.lower()
        if label in _FIGURES and name_figure is not None:
            for box in block.boxes or (None,):
                address = name_figure(num_figures, box)
                parts.extend([f"![]({address})"] if address else ())
                num_figures += 1
        if block.text:
            needs_sign = label in _HEADINGS and not block.text.startswith("#")
            parts.append((_HEADINGS[label] if needs_sign else "") + format_tables(block.text, is_html=is_html))
    return _BLANK_LINES.sub("\n\n", "\n\n".join(parts)).strip()


def render_text(blocks: Sequence[LayoutBlock]) -> str:
    """One page without markup; table rows become lines with tabs between cells."""
    texts = (_to_text(block.text) for block in blocks)
    return _BLANK_LINES.sub("\n\n", "\n\n".join(text for text in texts if text)).strip()


def format_tables(text: str, *, is_html: bool = False) -> str:
    """Convert each `<table>` to a markdown table, or to plain HTML when `is_html` or cells span rows or columns.

    Truncated tables are closed. A caption, and text between rows, become paragraphs.
    """
    parts = (
        part if isinstance(part, str) else f"\n\n{_format_table(part, is_html)}\n\n" for part in split_tables(text)
    )
    return "".join(parts).strip()


def _to_text(text: str) -> str:
    """Plain text, with each table on lines of its own."""
    found = ""
    for part in split_tables(text):
        piece = strip_markup(part).strip(" \t") if isinstance(part, str) else _to_lines(part)
        is_apart = not found or found.endswith("\n") or piece.startswith("\n")
        found += piece if is_apart or not piece else f"\n{piece}"
    return found


def _to_lines(table: Table) -> str:
    rows = ("\t".join(cell.text for cell in row) for row in table.rows)
    return "\n".join(filter(None, (*map(_to_line, table.caption), *rows, *map(_to_line, table.after))))


def _to_line(markup: str) -> str:
    return Cell(markup).text


def _format_table(table: Table, is_html: bool) -> str:
    captions, after = ([Cell(markup).format(_escape) for markup in texts] for texts in (table.caption, table.after))
    is_html = is_html or any(cell.columns > 1 or cell.rows > 1 for row in table.rows for cell in row)
    rows = _to_html(table.rows) if is_html else _to_pipes(table.rows)
    return "\n\n".join(filter(None, [*captions, rows, *after]))


def table_to_html(table: Table) -> str:
    """A table as plain HTML, with its caption before it and stray texts after it."""
    captions, after = (
        [f"<p>{Cell(markup).format(_escape_html)}</p>" for markup in texts] for texts in (table.caption, table.after)
    )
    return "\n".join([*captions, *([_to_html(table.rows)] if table.rows else []), *after])


def _to_pipes(rows: list[list[Cell]]) -> str:
    if not rows:
        return ""
    num_columns = max(map(len, rows))
    lines = [
        "| " + " | ".join([cell.format(_escape) for cell in row] + [""] * (num_columns - len(row))) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + " --- |" * num_columns, *lines[1:]])


def _escape(text: str) -> str:
    """Escape what markdown would interpret, HTML included."""
    text = _TAG_LIKE.sub("&lt;", _ENTITY_LIKE.sub("&amp;", text))
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _to_html(rows: list[list[Cell]]) -> str:
    lines = ("<tr>" + "".join(map(_cell_to_html, row)) + "</tr>" for row in rows)
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _cell_to_html(cell: Cell) -> str:
    name = "th" if cell.is_head else "td"
    columns = f' colspan="{cell.columns}"' if cell.columns > 1 else ""
    rows = f' rowspan="{cell.rows}"' if cell.rows > 1 else ""
    return f"<{name}{columns}{rows}>{cell.format(_escape_html)}</{name}>"


def _escape_html(text: str) -> str:
    return html.escape(text, quote=False)
