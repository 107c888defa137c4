"""What is to be read and how, in one value that goes from the API, or a job, down to each page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.ocr.rendering.pool import OpenedDocument
from serving.ocr_api.options import ReadOptions
from serving.settings.ocr import OcrSettings


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Pages of one document, and how they are to be read."""

    document: OpenedDocument
    pages: Sequence[int]
    """Indices, counted from 0."""
    options: ReadOptions
    prompt: str
    request_id: str
    """Requests to the router are known by this, the page's number and that of the attempt."""
    api_key: str | None = field(default=None, repr=False)
    """Sent to the router with every page."""
    charged: Mapping[int, int] = field(default_factory=dict)
    """What pages were charged before, by index, in nanodollars. They are not charged that again."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """When set, no further page is begun; those under way are finished."""


def choose_prompt(options: ReadOptions, settings: OcrSettings) -> str:
    """The prompt of the options, or the usual one of their format."""
    return options.prompt or (settings.text_prompt if options.format == "text" else settings.markdown_prompt)
