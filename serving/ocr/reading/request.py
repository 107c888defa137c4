"""The request to read a document: one value that is passed from the API, or from a job, down to each page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.ocr.rendering.pool import OpenedDocument
from serving.ocr_api.options import ReadOptions
from serving.settings.ocr import OcrSettings


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Which pages of a document to read, and how."""

    document: OpenedDocument
    pages: Sequence[int]
    """Indices, counted from 0."""
    options: ReadOptions
    prompt: str
    request_id: str
    """Ids of requests to the router consist of this, the page's number and the number of the attempt."""
    api_key: str | None = field(default=None, repr=False)
    """Sent to the router with every page."""
    charged: Mapping[int, int] = field(default_factory=dict)
    """What pages were charged before: nanodollars by page index. This is deducted from further charges."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """When set, no further page is started; those in flight are finished."""


def choose_page_base(options: ReadOptions) -> int | None:
    """How `pages` was counted; None if it was not given."""
    if options.pages is None:
        return None
    return 1 if options.page_base is None else options.page_base


def choose_prompt(options: ReadOptions, settings: OcrSettings) -> str:
    """The prompt in the options, or else the default of their format."""
    return options.prompt or (settings.text_prompt if options.format == "text" else settings.markdown_prompt)
