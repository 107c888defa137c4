"""Renders one page as a document of its own: HTML, hOCR or ALTO. Pure; whatever the model wrote is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

from serving.ocr.text.layout import Box, LayoutBlock
from serving.ocr.text.markdown import table_to_html
from serving.ocr.text.tables import Table, split_tables, strip_markup

_FIGURES = frozenset({"image", "figure"})
_TITLES = {"title": 1, "sub_title": 2}
_SIGNS = re.compile(r"^(#{1,6})\s+")
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class WordBox:
    text: str
    box: Box


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A block with its words on the page; without lines its place is unknown."""

    text: str
    box: Box | None
    lines: tuple[tuple[WordBox, ...], ...] = ()


def render_html(blocks: Sequence[LayoutBlock], number: int, figures: Mapping[Box, str]) -> str:
    """A web page; `figures` are images by their boxes, as base64."""
    parts: list[str] = []
    for block in blocks:
        if block.label.lower() in _FIGURES:
            found = [figures[box] for box in block.boxes if box in figures]
            parts += [f'<figure><img alt="" src="data:image/png;base64,{picture}"></figure>' for picture in found]
        parts += _to_html(block)
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html>\n<head><meta charset="utf-8"><title>Page {number}</title></head>\n'
        f'<body>\n<section id="page-{number}">\n{body}\n</section>\n</body>\n</html>\n'
    )


def _to_html(block: LayoutBlock) -> list[str]:
    parts: list[str] = []
    level = _TITLES.get(block.label.lower(), 0)
    for piece in split_tables(block.text):
        if isinstance(piece, Table):
            parts.append(table_to_html(piece))
            continue
        for paragraph in filter(str.strip, strip_markup(piece).split("\n\n")):
            signs = _SIGNS.match(paragraph.strip())
            depth = len(signs.group(1)) if signs is not None else level
            text = html.escape(_SIGNS.sub("", paragraph.strip()), quote=False).replace("\n", "<br>\n")
            parts.append(f"<h{depth}>{text}</h{depth}>" if depth else f"<p>{text}</p>")
    return parts


def render_hocr(blocks: Sequence[PlacedText], number: int, size: tuple[int, int], dpi: int | None) -> str:
    """An hOCR document of one page. Blocks whose place is unknown have no bbox and the class `unplaced`."""
    resolution = f"; scan_res {dpi} {dpi}" if dpi is not None else ""
    title = f"bbox 0 0 {size[0]} {size[1]}; ppageno {number - 1}{resolution}"
    areas = "\n".join(_to_hocr(block, f"{number}_{index + 1}") for index, block in enumerate(blocks))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<html xmlns="http://www.w3.org/1999/xhtml">\n<head>\n'
        f'<title>Page {number}</title>\n<meta charset="utf-8"/>\n<meta name="ocr-system" content="serving"/>\n'
        '<meta name="ocr-capabilities" content="ocr_page ocr_carea ocr_par ocr_line ocrx_word"/>\n</head>\n<body>\n'
        f'<div class="ocr_page" id="page_{number}" title="{title}">\n{areas}\n</div>\n</body>\n</html>\n'
    )


def _to_hocr(block: PlacedText, name: str) -> str:
    if block.box is None:
        return f'<p class="ocr_par unplaced" id="par_{name}">{_escape(block.text)}</p>'
    lines = []
    for line in block.lines:
        words = " ".join(
            f'<span class="ocrx_word" title="{_bbox(word.box)}">{_escape(word.text)}</span>' for word in line
        )
        lines.append(f'<span class="ocr_line" title="{_bbox(join_boxes([word.box for word in line]))}">{words}</span>')
    title = _bbox(block.box)
    paragraph = f'<p class="ocr_par" id="par_{name}" title="{title}">\n' + "\n".join(lines) + "\n</p>"
    return f'<div class="ocr_carea" id="block_{name}" title="{title}">\n{paragraph}\n</div>'


def render_alto(blocks: Sequence[PlacedText], number: int, size: tuple[int, int]) -> str:
    """An ALTO 4 document of one page. Blocks whose place is unknown have no position and the tag `unplaced`."""
    width, height = size
    texts = "\n".join(_to_alto(block, f"{number}_{index + 1}") for index, block in enumerate(blocks))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<alto xmlns="http://www.loc.gov/standards/alto/ns-v4#">\n'
        "<Description><MeasurementUnit>pixel</MeasurementUnit></Description>\n"
        '<Tags><OtherTag ID="unplaced" LABEL="place on the page unknown"/></Tags>\n<Layout>\n'
        f'<Page ID="page_{number}" PHYSICAL_IMG_NR="{number}" WIDTH="{width}" HEIGHT="{height}">\n'
        f'<PrintSpace HPOS="0" VPOS="0" WIDTH="{width}" HEIGHT="{height}">\n{texts}\n</PrintSpace>\n</Page>\n'
        "</Layout>\n</alto>\n"
    )


def _to_alto(block: PlacedText, name: str) -> str:
    if block.box is None:
        lines = [
            "<TextLine>" + "<SP/>".join(f"<String CONTENT={_quote(word)}/>" for word in line.split()) + "</TextLine>"
            for line in block.text.splitlines()
            if line.strip()
        ]
        return f'<TextBlock ID="block_{name}" TAGREFS="unplaced">\n' + "\n".join(lines) + "\n</TextBlock>"
    lines = []
    for line in block.lines:
        strings = "<SP/>".join(f"<String CONTENT={_quote(word.text)} {_position(word.box)}/>" for word in line)
        lines.append(f"<TextLine {_position(join_boxes([word.box for word in line]))}>{strings}</TextLine>")
    return f'<TextBlock ID="block_{name}" {_position(block.box)}>\n' + "\n".join(lines) + "\n</TextBlock>"


def join_boxes(boxes: Sequence[Box]) -> Box:
    """The smallest box around several."""
    return Box(
        min(box.left for box in boxes),
        min(box.top for box in boxes),
        max(box.right for box in boxes),
        max(box.bottom for box in boxes),
    )


def _bbox(box: Box) -> str:
    return f"bbox {box.left} {box.top} {box.right} {box.bottom}"


def _position(box: Box) -> str:
    return f'HPOS="{box.left}" VPOS="{box.top}" WIDTH="{box.right - box.left}" HEIGHT="{box.bottom - box.top}"'


def _escape(text: str) -> str:
    return html.escape(_NOT_XML.sub("\ufffd", text), quote=False)


def _quote(text: str) -> str:
    return quoteattr(_NOT_XML.sub("\ufffd", text))
