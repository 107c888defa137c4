"""The OCR service's section of the settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.frozen import Frozen


class RenderSettings(Frozen):
    """How documents become pages, and what a document may cost."""

    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Processes that render, each one page at a time."""
    max_pages: Annotated[int, Field(ge=1)] = 1000
    """Of one document that are read at once; of a longer one pages have to be chosen."""
    max_page_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    """A page that has more, or would have at its dpi, fails."""
    dpi: Annotated[int, Field(ge=18, le=600)] = 144
    """Of PDF pages when a request doesn't say; the published code's own."""
    page_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """After so long on one page a worker is killed, and the page has failed."""
    worker_memory_bytes: Annotated[int, Field(ge=256 * 2**20)] = 2 * 2**30
    """Address space of one worker."""
    pages_per_worker: Annotated[int, Field(ge=1)] = 500
    """After so many a worker is replaced: what a document leaked goes with it."""


class ReadSettings(Frozen):
    """How pages are read through the router."""

    max_tries: Annotated[int, Field(ge=1, le=10)] = 4
    """Requests per page, the first one included."""
    page_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """For one page, all its tries and the waits between them together."""
    silence_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time without a byte of an answer."""
    max_wait_s: Annotated[float, Field(gt=0)] = 30.0
    """A page fails when the router asks for a longer wait (`Retry-After`) than this."""


class OcrSettings(Frozen):
    render: RenderSettings = RenderSettings()
    read: ReadSettings = ReadSettings()
