"""Reads a document's pages, several in parallel: each is rendered in a worker process and read through the router.

A page's image is held only while the router has it, and events wait in a queue of bounded length. A document of a
thousand pages, or a client that reads slowly, therefore needs no more memory than a short document.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pybase64

from serving.errors import ServingError
from serving.ocr.reading.pages import Delta, PageFailure, PageReader, PageReading, TryStarted
from serving.ocr.reading.request import ReadRequest
from serving.ocr.reading.results import (
    PageResult,
    as_failure,
    build_page,
    build_unread_page,
    find_figures,
    measure,
)
from serving.ocr.rendering.pool import DrawnPage, Renderer
from serving.ocr.text.layout import Box, parse_layout
from serving.ocr_api.shapes import Dimensions, PageDelta, PageImage, PageStarted
from serving.settings.ocr import OcrSettings

_QUEUED_EVENTS = 256
_MAX_PICTURES = 20
"""Page images sent per stream: more would rarely be looked at, and they are large."""
_MAX_PICTURE_BYTES = 4 * 2**20
_FOR_ALL = frozenset({401, 403, 404})
"""Statuses of the router that every other page of the document would get too."""
_QUOTA = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class PageEnded:
    """A page has ended. The consumer calls `Pipeline.count` once it has delivered or stored it."""

    result: PageResult
    seconds: float
    """From the start of rendering to the end of the page."""


PipelineEvent = PageStarted | PageImage | PageDelta | PageEnded
"""All but the last are the API's own events."""


class Observer(Protocol):
    """Receives measurements; implemented by the metrics."""

    def see_render(self, seconds: float) -> None: ...

    def see_page(self, *, is_failed: bool, num_retries: int, seconds: float) -> None: ...


@dataclass(slots=True, eq=False)
class _Run:
    """The state of one request while it runs."""

    request: ReadRequest
    figure_bytes_left: int
    events: asyncio.Queue[PipelineEvent] = field(default_factory=lambda: asyncio.Queue(_QUEUED_EVENTS))


def is_for_all(failure: PageFailure | None) -> bool:
    """Whether every other page of the document would fail for the same reason."""
    return failure is not None and (failure.status in _FOR_ALL or failure.code == _QUOTA)


def wants_page_image(request: ReadRequest, index: int, image: DrawnPage) -> bool:
    """Whether the stream sends this page's image."""
    is_wanted = request.options.stream and request.options.include_page_images
    return is_wanted and index in request.pages[:_MAX_PICTURES] and len(image.data) <= _MAX_PICTURE_BYTES


class Pipeline:
    """Reads documents. One per process; all documents share its renderer and connections."""

    def __init__(self, renderer: Renderer, reader: PageReader, settings: OcrSettings, observer: Observer) -> None:
        self._renderer = renderer
        self._reader = reader
        self._settings = settings
        self._observer = observer

    async def read(self, request: ReadRequest) -> AsyncGenerator[PipelineEvent]:
        """Read all pages and yield their events as they happen; every page ends exactly once.

        When a page fails for a reason that applies to the whole document, pages that have not started fail with the
        same reason. Closing the generator cancels what is in flight.
        """
        run = _Run(request, self._settings.max_figure_bytes)
        waiting = iter(request.pages)
        shared: list[PageFailure] = []

        async def read_next_pages() -> None:
            for index in waiting:
                if request.stop.is_set():
                    return
                started_s = time.monotonic()
                if shared:
                    result = build_unread_page(index, shared[0], request.charged.get(index, 0))
                else:
                    result = await self._read_page(run, index)
                if is_for_all(result.failure) and result.failure is not None:
                    shared.append(result.failure)
                await run.events.put(PageEnded(result, time.monotonic() - started_s))

        num_workers = min(self._settings.pages_in_parallel, len(request.pages))
        workers = [asyncio.create_task(read_next_pages()) for _ in range(num_workers)]
        try:
            while (event := await _next(run.events, workers)) is not None:
                yield event
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def count(self, ended: PageEnded) -> None:
        """Record metrics for a finished page. Pages that could not be delivered or stored are not counted."""
        result = ended.result
        self._observer.see_page(is_failed=result.is_failed, num_retries=result.page.retries, seconds=ended.seconds)

    async def _read_page(self, run: _Run, index: int) -> PageResult:
        request, started_s = run.request, time.monotonic()
        try:
            image = await self._renderer.draw(request.document, index, request.options.dpi)
        except ServingError as error:
            return build_unread_page(index, as_failure(error), request.charged.get(index, 0))
        self._observer.see_render(time.monotonic() - started_s)
        return await self._read_image(run, index, image)

    async def _read_image(self, run: _Run, index: int, image: DrawnPage) -> PageResult:
        request, events = run.request, run.events
        dimensions = measure(request.document, image, request.options.dpi or self._settings.render.dpi)
        reading: PageReading | None = None
        async with contextlib.aclosing(self._reader.read(image, request, index)) as read:
            async for event in read:
                if isinstance(event, TryStarted):
                    started = PageStarted(index=index, attempt=event.number, mode=event.mode, dimensions=dimensions)
                    await events.put(started)
                    if event.number == 1 and wants_page_image(request, index, image):
                        picture = PageImage(
                            index=index, image_url=image.as_url(), width=image.width, height=image.height
                        )
                        await events.put(picture)
                elif isinstance(event, Delta):
                    await events.put(PageDelta(index=index, text=event.text))
                else:
                    reading = event
        assert reading is not None  # a reader's last event
        figures = await self._cut_figures(run, index, reading, dimensions) if request.options.include_images else None
        return build_page(index, reading, dimensions, request.options.format, figures)

    async def _cut_figures(
        self, run: _Run, index: int, reading: PageReading, dimensions: Dimensions
    ) -> list[tuple[Box, str]]:
        """Figures with their images as base64.

        Figures that cannot be cut out, or exceed the document's budget of bytes, are left out: the boxes come from the
        model and may be anywhere.
        """
        blocks = parse_layout(reading.text, dimensions.width, dimensions.height)
        figures = []
        for box in find_figures(blocks, self._settings.max_figures):
            with contextlib.suppress(ServingError):
                cut = await self._renderer.draw(run.request.document, index, run.request.options.dpi, box)
                if len(cut.data) <= run.figure_bytes_left:
                    run.figure_bytes_left -= len(cut.data)
                    figures.append((box, pybase64.b64encode(cut.data).decode()))
        return figures


async def _next(events: asyncio.Queue[PipelineEvent], workers: Sequence[asyncio.Task[None]]) -> PipelineEvent | None:
    """The next event; None after the last one. Raises the exception of a task that failed."""
    while events.empty():
        busy = [task for task in workers if not task.done()]
        for task in workers:
            if task.done():
                task.result()
        if not busy:
            return None
        getting = asyncio.ensure_future(events.get())
        try:
            await asyncio.wait([getting, *busy], return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
        finally:
            getting.cancel()
    return events.get_nowait()
