"""Turns what was read of a page into the API's shapes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pybase64

from serving.errors import ServingError
from serving.ocr.reading.pages import NANO_PER_DOLLAR, PageFailure, PageReading, PageUsage
from serving.ocr.rendering.pool import DrawnPage, OpenedDocument, PageLayer
from serving.ocr.text.documents import PlacedText, join_boxes, render_alto, render_hocr, render_html
from serving.ocr.text.layout import Box, LayoutBlock, parse_layout
from serving.ocr.text.markdown import render_markdown, render_text
from serving.ocr_api.options import ReadOptions
from serving.ocr_api.shapes import (
    Block,
    Dimensions,
    DocumentFacts,
    ErrorDetail,
    ImageTokens,
    OcrPage,
    OcrPageUsage,
    OcrUsage,
    PageFigure,
)

FIGURES = frozenset({"image", "figure"})
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


_MARKDOWN = frozenset({"markdown", "layout"})


@dataclass(frozen=True, slots=True)
class PlacedPage:
    """A page's words in their places, or the PDF that has them."""

    blocks: Sequence[PlacedText] = ()
    pdf: bytes = b""


@dataclass(frozen=True, slots=True)
class PageResult:
    """A finished page."""

    page: OcrPage
    usage: PageUsage
    """With the exact cost, which `page` has as a float."""
    failure: PageFailure | None

    @property
    def is_failed(self) -> bool:
        return self.failure is not None


def measure(image: DrawnPage) -> Dimensions:
    """The dimensions of a rendered page."""
    return Dimensions(width=image.width, height=image.height, dpi=image.dpi)


def parse_reading(reading: PageReading, image: DrawnPage) -> list[LayoutBlock]:
    """The blocks of all parts of a page, with boxes in pixels of the page."""
    parts = image.parts or (Box(0, 0, image.width, image.height),)
    found: list[LayoutBlock] = []
    for text, part in zip(reading.texts, parts, strict=False):
        blocks = parse_layout(text, part.right - part.left, part.bottom - part.top)
        found.extend(
            replace(block, boxes=tuple(box.moved(part.left, part.top) for box in block.boxes)) for block in blocks
        )
    return found


def parse_layer(layer: PageLayer, width: int, height: int) -> list[LayoutBlock]:
    """The lines of a page's text layer as blocks: one for each paragraph."""
    blocks: list[LayoutBlock] = []
    for line in layer.lines:
        left, top, right, bottom = line.box
        box = Box(round(left * width), round(top * height), round(right * width), round(bottom * height))
        last = blocks[-1].boxes[0] if blocks else None
        if last is not None and _continues(last, box):
            joined = Box(min(last.left, box.left), last.top, max(last.right, box.right), max(last.bottom, box.bottom))
            blocks[-1] = LayoutBlock("text", (joined,), f"{blocks[-1].text}\n{line.text}")
        else:
            blocks.append(LayoutBlock("text", (box,), line.text))
    return blocks


def _continues(paragraph: Box, line: Box) -> bool:
    """Whether a line belongs to the paragraph above it."""
    height = max(1, line.bottom - line.top)
    overlaps = min(paragraph.right, line.right) > max(paragraph.left, line.left)
    return overlaps and -height / 2 < line.top - paragraph.bottom < height * 0.8


def find_figures(blocks: Sequence[LayoutBlock], max_figures: int, least_side: int = 0) -> list[Box]:
    """Boxes of a page's figures, in order and without duplicates. Figures without box or area, or with a side shorter
    than `least_side` pixels, are left out."""
    least_side = max(1, least_side)
    boxes = dict.fromkeys(box for block in blocks if block.label.lower() in FIGURES for box in block.boxes)
    sized = [box for box in boxes if min(box.right - box.left, box.bottom - box.top) >= least_side]
    return sized[:max_figures]


def name_figure(index: int, box: Box, figures: Sequence[Box]) -> str | None:
    """The id of a figure that was cut out; None if it was not."""
    return f"page-{index + 1}-figure-{figures.index(box) + 1}" if box in figures else None


def build_page(
    index: int,
    reading: PageReading,
    blocks: Sequence[LayoutBlock],
    image: DrawnPage,
    options: ReadOptions,
    figures: Sequence[tuple[Box, str]] | None = None,
    placed: PlacedPage | None = None,
) -> PageResult:
    """The result for a page that was read, or that failed while it was read.

    Args:
        index: counted from 0.
        reading: what was read.
        blocks: what `parse_reading` found in it, or `parse_layer` in the text layer.
        image: the page that was sent.
        options: the format that was asked for.
        figures: boxes and images (base64) of figures that were cut out; None when they were not requested.
        placed: the page with its words in their places, for the formats that need it.
    """
    boxes = [box for box, _ in figures or ()]
    form, is_html = options.format, options.table_format == "html"

    def name(_: int, box: Box | None) -> str | None:
        return name_figure(index, box, boxes) if box is not None else None

    page = OcrPage(
        index=index,
        number=index + 1,
        status="completed" if reading.failure is None else "failed",
        dimensions=measure(image),
        text=render_text(blocks) if form == "text" else None,
        markdown=render_markdown(blocks, name if figures is not None else None, is_html=is_html)
        if form in _MARKDOWN
        else None,
        html=render_html(blocks, index + 1, dict(figures or ())) if form == "html" else None,
        hocr=_render_hocr(index, image, placed) if form == "hocr" and placed is not None else None,
        alto=_render_alto(index, image, placed) if form == "alto" and placed is not None else None,
        pdf_base64=pybase64.b64encode(placed.pdf).decode() if form == "pdf" and placed is not None else None,
        blocks=tuple(map(_build_block, blocks)) if form == "layout" else None,
        images=_build_figures(index, figures) if figures is not None else None,
        mode=reading.mode,
        finish_reason=_finish_reason(reading),
        retries=reading.num_retries,
        usage=_build_page_usage(reading.usage),
        error=build_error(reading.failure) if reading.failure is not None else None,
        warnings=image.warnings or None,
    )
    return PageResult(page, reading.usage, reading.failure)


def find_texts(blocks: Sequence[LayoutBlock]) -> list[tuple[str, Box | None]]:
    """The plain text of each block, with the place where the model saw it."""
    texts = ((render_text([block]), block.boxes) for block in blocks)
    return [(text, join_boxes(boxes) if boxes else None) for text, boxes in texts if text]


def _render_hocr(index: int, image: DrawnPage, placed: PlacedPage) -> str:
    return render_hocr(placed.blocks, index + 1, (image.width, image.height), image.dpi)


def _render_alto(index: int, image: DrawnPage, placed: PlacedPage) -> str:
    return render_alto(placed.blocks, index + 1, (image.width, image.height))


def build_unread_page(index: int, failure: PageFailure, charged_nanodollars: int = 0) -> PageResult:
    """The result for a page that failed before it could be read. It may have been charged by an earlier service."""
    usage = PageUsage(cost_nanodollars=charged_nanodollars)
    page = OcrPage(
        index=index, number=index + 1, status="failed", usage=_build_page_usage(usage), error=build_error(failure)
    )
    return PageResult(page, usage, failure)


def build_usage(usage: PageUsage, num_pages: int, num_failed: int) -> OcrUsage:
    """Totals of a document; `num_pages` includes failed pages."""
    return OcrUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=ImageTokens(image_tokens=usage.image_tokens),
        estimated_cost=usage.cost_nanodollars / NANO_PER_DOLLAR,
        pages_processed=num_pages - num_failed,
        pages_failed=num_failed,
    )


def build_error(failure: PageFailure) -> ErrorDetail:
    """A failure in the shape of OpenAI's errors."""
    status = failure.status or 500
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if failure.code == "insufficient_quota":
        kind = failure.code
    return ErrorDetail(message=failure.message, type=kind, code=failure.code)


def build_document(document: OpenedDocument, size_bytes: int) -> DocumentFacts:
    """Facts about an opened document."""
    return DocumentFacts(format=document.format.value, num_pages=document.num_pages, size_bytes=size_bytes)


def as_failure(error: ServingError) -> PageFailure:
    """The failure of a page that an error causes."""
    return PageFailure(error.code or error.type, error.message, error.http_status)


def _build_block(block: LayoutBlock) -> Block:
    return Block(label=block.label, text=block.text, boxes=tuple(map(_edges, block.boxes)))


def _build_figures(index: int, figures: Sequence[tuple[Box, str]]) -> tuple[PageFigure, ...]:
    boxes = [box for box, _ in figures]
    return tuple(
        PageFigure(id=name_figure(index, box, boxes) or "", box=_edges(box), image_base64=picture)
        for box, picture in figures
    )


def _build_page_usage(usage: PageUsage) -> OcrPageUsage:
    return OcrPageUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        image_tokens=usage.image_tokens,
        estimated_cost=usage.cost_nanodollars / NANO_PER_DOLLAR,
    )


def _finish_reason(reading: PageReading) -> str | None:
    if reading.failure is not None:
        return "repetition" if reading.failure.code == "repetition" else None
    return "length" if reading.is_cut else "stop"


def _edges(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.right, box.bottom
