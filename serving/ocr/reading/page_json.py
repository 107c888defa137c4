"""From what was read of a page to what the API says of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.errors import ServingError
from serving.ocr.reading.pages import NANO_PER_DOLLAR, PageFailure, PageReading, PageUsage
from serving.ocr.rendering.formats import DocumentFormat
from serving.ocr.rendering.pool import DrawnPage, OpenedDocument
from serving.ocr.text.layout import Box, LayoutBlock, parse_layout
from serving.ocr.text.markdown import render_markdown, render_text

FIGURES = frozenset({"image", "figure"})
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Of a page as it was read, in pixels."""

    width: int
    height: int
    dpi: int | None
    """None for a picture, which has the pixels that it has."""

    def to_json(self) -> dict[str, Any]:
        return {"width": self.width, "height": self.height, "dpi": self.dpi}


@dataclass(frozen=True, slots=True)
class PageResult:
    """One page that is done with."""

    index: int
    body: dict[str, Any]
    """As the API shows it."""
    usage: PageUsage
    failure: PageFailure | None

    @property
    def is_failed(self) -> bool:
        return self.failure is not None

    @property
    def num_retries(self) -> int:
        return int(self.body["retries"])


def measure(document: OpenedDocument, image: DrawnPage, dpi: int) -> Dimensions:
    """Of a page that was drawn at `dpi`, where it has no pixels of its own."""
    return Dimensions(image.width, image.height, dpi if document.format is DocumentFormat.PDF else None)


def find_figures(blocks: Sequence[LayoutBlock], max_figures: int) -> list[Box]:
    """Boxes of a page's figures, in order and each once; figures without one, or without area, cannot be cut out."""
    boxes = dict.fromkeys(box for block in blocks if block.label.lower() in FIGURES for box in block.boxes)
    return [box for box in boxes if box.right > box.left and box.bottom > box.top][:max_figures]


def name_figure(index: int, box: Box, figures: Sequence[Box]) -> str | None:
    """The id of a figure that was cut out; None for one that was not."""
    return f"page-{index + 1}-figure-{figures.index(box) + 1}" if box in figures else None


def build_page(
    index: int,
    reading: PageReading,
    dimensions: Dimensions,
    form: str,
    figures: Sequence[tuple[Box, str]] | None = None,
) -> PageResult:
    """A page that was read, or failed while it was.

    Args:
        index: counted from 0.
        reading: what came of it.
        dimensions: of the page as it was sent.
        form: markdown, text or layout.
        figures: boxes and pictures (base64) of figures that were cut out; None when nobody wants them.
    """
    blocks = parse_layout(reading.text, dimensions.width, dimensions.height)
    body = _page_head_to_json(index, dimensions)
    boxes = [box for box, _ in figures or ()]
    if form == "text":
        body["text"] = render_text(blocks)
    else:
        naming = None
        if figures is not None:
            naming = lambda _, box: name_figure(index, box, boxes) if box is not None else None  # noqa: E731
        body["markdown"] = render_markdown(blocks, naming)
    if form == "layout":
        body["blocks"] = [block_to_json(block) for block in blocks]
    if figures is not None:
        body["images"] = [
            {"id": name_figure(index, box, boxes), "box": list(_edges(box)), "image_base64": picture}
            for box, picture in figures
        ]
    body |= {
        "mode": reading.mode,
        "finish_reason": _finish_reason(reading),
        "retries": reading.num_tries - 1,
        "usage": _page_usage_to_json(reading.usage),
        "error": failure_to_json(reading.failure),
        "status": "completed" if reading.failure is None else "failed",
    }
    return PageResult(index, body, reading.usage, reading.failure)


def build_unread_page(index: int, failure: PageFailure, charged_nanodollars: int = 0) -> PageResult:
    """A page that did not come so far that it could be read, though it may have been charged for once."""
    usage = PageUsage(cost_nanodollars=charged_nanodollars)
    body = _page_head_to_json(index, None) | {
        "mode": None,
        "finish_reason": None,
        "retries": 0,
        "usage": _page_usage_to_json(usage),
        "error": failure_to_json(failure),
        "status": "failed",
    }
    return PageResult(index, body, usage, failure)


def block_to_json(block: LayoutBlock) -> dict[str, Any]:
    return {"label": block.label, "text": block.text, "boxes": [list(_edges(box)) for box in block.boxes]}


def usage_to_json(usage: PageUsage, num_pages: int, num_failed: int) -> dict[str, Any]:
    """Totals; `num_pages` counts the failed ones too."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"image_tokens": usage.image_tokens},
        "estimated_cost": usage.cost_nanodollars / NANO_PER_DOLLAR,
        "pages_processed": num_pages - num_failed,
        "pages_failed": num_failed,
    }


def failure_to_json(failure: PageFailure | None) -> dict[str, Any] | None:
    """In OpenAI's shape."""
    if failure is None:
        return None
    status = failure.status or 500
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if failure.code == "insufficient_quota":
        kind = failure.code
    return {"message": failure.message, "type": kind, "param": None, "code": failure.code}


def as_failure(error: ServingError) -> PageFailure:
    """What an error of ours means for a page."""
    return PageFailure(error.code or error.type, error.message, error.http_status)


def _page_head_to_json(index: int, dimensions: Dimensions | None) -> dict[str, Any]:
    body = dimensions.to_json() if dimensions is not None else None
    return {"index": index, "number": index + 1, "status": "", "dimensions": body}


def _page_usage_to_json(usage: PageUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "image_tokens": usage.image_tokens,
        "estimated_cost": usage.cost_nanodollars / NANO_PER_DOLLAR,
    }


def _finish_reason(reading: PageReading) -> str | None:
    if reading.failure is not None:
        return "repetition" if reading.failure.code == "repetition" else None
    return "length" if reading.is_cut else "stop"


def _edges(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.right, box.bottom
