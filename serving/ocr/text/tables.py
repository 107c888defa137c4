"""Parses the HTML tables that models write within text. Pure; never raises and loses no text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_TAG = re.compile(r"<(/?)(table|thead|tbody|tfoot|caption|tr|td|th)\b([^<>]*)>", re.IGNORECASE)
_SPAN = re.compile(r"\b(colspan|rowspan)\s*=\s*[\"']?(\d{1,3})(?!\d)", re.IGNORECASE)
_BREAKS = frozenset({"br", "p", "div", "li"})
_KEPT = frozenset({"sup", "sub", "b", "strong", "i", "em", "u", "s"})
"""Tags that are kept in markdown and HTML."""
_INLINE = re.compile(
    rf"<(/?)({'|'.join(sorted({*_BREAKS, *_KEPT, 'span', 'font', 'small', 'center', 'ul', 'ol'}))})\b[^<>]*>",
    re.IGNORECASE,
)
"""Tags that count as markup within a cell. Anything else that looks like a tag is text of the page."""
_OUTSIDE = re.compile(r"<(/?)(br|sup|sub)\b[^<>]*>", re.IGNORECASE)
"""Tags that count as markup outside of tables, where a page may well contain `<b>` as text."""
_SPACE = re.compile(r"\s+")
_SIGNS = "0123456789+-=()"
_SCRIPTS = {
    "sup": str.maketrans(_SIGNS, "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾"),
    "sub": str.maketrans(_SIGNS, "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    markup: str
    """As the model wrote it; of a nested table only the texts are kept."""
    columns: int = 1
    rows: int = 1
    is_head: bool = False

    @property
    def text(self) -> str:
        """The text on one line, without markup."""
        return _SPACE.sub(" ", _drop_tags(_INLINE, self.markup, " ", html.unescape)).strip()

    def format(self, escape: Callable[[str], str]) -> str:
        """The text on one line with the meaningful tags, properly paired."""
        parts, opened = list[str](), list[str]()
        for text, tag, is_end in _split(_INLINE, self.markup):
            parts.append(escape(html.unescape(text)))
            if tag in _BREAKS:
                parts.append("<br>" if tag == "br" else " ")
            elif tag in _KEPT and not is_end:
                opened.append(tag)
                parts.append(f"<{tag}>")
            elif opened and tag == opened[-1]:
                parts.append(f"</{opened.pop()}>")
        parts.extend(f"</{tag}>" for tag in reversed(opened))
        return _SPACE.sub(" ", "".join(parts)).strip()


@dataclass(slots=True)
class Table:
    rows: list[list[Cell]] = field(default_factory=list)
    caption: list[str] = field(default_factory=list)
    """Texts that belong before the table."""
    after: list[str] = field(default_factory=list)
    """Texts between rows or cells, where HTML allows none."""


def split_tables(text: str) -> list[str | Table]:
    """Text and tables in their order. A truncated table ends with the text, or where the next one begins."""
    reader = _Reader()
    end = 0
    for tag in _TAG.finditer(text):
        reader.take(text[end : tag.start()])
        reader.turn(tag)
        end = tag.end()
    reader.take(text[end:])
    return reader.finish()


def strip_markup(text: str) -> str:
    """Remove the tags from text outside of tables, keeping separate what they separated."""
    text = _TAG.sub(lambda tag: "\t" if tag.group(2).lower() in ("td", "th") else "\n", text)
    return _drop_tags(_OUTSIDE, text, "\n", lambda part: part)


class _Reader:
    """Consumes tags one by one. A table within a cell becomes part of it; between cells it ends the current table."""

    def __init__(self) -> None:
        self._parts: list[str | Table] = []
        self._table: Table | None = None
        self._cell: Cell | None = None
        self._is_caption = False
        self._num_inner = 0
        self._held: list[str] = []

    def take(self, text: str) -> None:
        """The text between two tags."""
        if self._cell is None and not self._is_caption and self._table is not None:
            self._table.after.extend([text] if text.strip() else ())
        else:
            self._held.append(text)

    def turn(self, tag: re.Match[str]) -> None:
        """The next tag."""
        name, is_end = tag.group(2).lower(), bool(tag.group(1))
        if self._table is None:
            if name == "table" and not is_end:
                self._begin_table()
            else:
                self._held.append(tag.group())
        elif self._num_inner or (name == "table" and not is_end and self._cell is not None):
            self._num_inner += 0 if name != "table" else -1 if is_end else 1
            self._held.append(" ")
        else:
            self._close_cell()
            if name == "table":
                self._close_table()
                if not is_end:
                    self._begin_table()
            elif not is_end:
                self._begin(name, tag.group(3))

    def finish(self) -> list[str | Table]:
        if self._table is not None:
            self._close_cell()
            self._close_table()
        self._take_text()
        return self._parts

    def _begin_table(self) -> None:
        self._take_text()
        self._table = Table()

    def _begin(self, name: str, attributes: str) -> None:
        assert self._table is not None
        if name == "tr":
            self._table.rows.append([])
        elif name == "caption":
            self._is_caption = True
        elif name in ("td", "th"):
            spans = {key.lower(): max(1, int(count)) for key, count in _SPAN.findall(attributes)}
            self._cell = Cell("", spans.get("colspan", 1), spans.get("rowspan", 1), name == "th")

    def _close_cell(self) -> None:
        assert self._table is not None
        markup = "".join(self._held)
        if self._is_caption:
            self._table.caption.append(markup)
        elif self._cell is not None:
            if not self._table.rows:
                self._table.rows.append([])
            cell = self._cell
            self._table.rows[-1].append(Cell(markup, cell.columns, cell.rows, cell.is_head))
        self._cell, self._is_caption, self._num_inner, self._held = None, False, 0, []

    def _close_table(self) -> None:
        assert self._table is not None
        self._table.rows = [row for row in self._table.rows if row]
        self._parts.append(self._table)
        self._table = None

    def _take_text(self) -> None:
        text = "".join(self._held)
        self._parts.extend([text] if text else ())
        self._held = []


def _split(tags: re.Pattern[str], text: str) -> Iterator[tuple[str, str, bool]]:
    """Texts, each with the name of the following tag and whether it is an end tag; the last name is empty."""
    end = 0
    for tag in tags.finditer(text):
        yield text[end : tag.start()], tag.group(2).lower(), bool(tag.group(1))
        end = tag.end()
    yield text[end:], "", False


def _drop_tags(tags: re.Pattern[str], text: str, breaking: str, decode: Callable[[str], str]) -> str:
    """Remove tags. Superscript and subscript digits become Unicode ones, so that `10<sup>2</sup>` is not 102."""
    parts, opened = list[str](), ""
    for piece, tag, is_end in _split(tags, text):
        is_whole = bool(opened) and is_end and tag == opened
        piece = decode(piece)
        parts.append(piece.translate(_SCRIPTS[opened]) if is_whole else f" {piece}" if opened else piece)
        if tag in _BREAKS:
            parts.append(breaking)
        elif tag in _SCRIPTS and is_end and not is_whole:
            parts.append(" ")
        opened = tag if tag in _SCRIPTS and not is_end else ""
    return "".join(parts)
