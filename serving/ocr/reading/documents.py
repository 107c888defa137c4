"""A document's pages, several at a time: drawn in a worker process, read through the router, told as they come.

A page holds its picture only while it is with the router, and what is told waits in a queue of bounded length, so a
document of a thousand pages and a client that reads slowly cost no more memory than a short one.
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
"""That a stream shows of one document; nobody looks at more, and they are large."""
_MAX_PICTURE_BYTES = 4 * 2**20
_FOR_ALL = frozenset({401, 403, 404})
"""Statuses of the router that every other page of the document would get as well."""
_QUOTA = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class PageEnded:
    """Whoever tells its owner of it, or stores it, has it counted (`Pipeline.count`)."""

    result: PageResult
    seconds: float
    """From the page's turn to its end."""


PipelineEvent = PageStarted | PageImage | PageDelta | PageEnded
"""All but the last are the API's own."""


class Observer(Protocol):
    """Hears what pages come to: the metrics."""

    def see_render(self, seconds: float) -> None: ...

    def see_page(self, *, is_failed: bool, num_retries: int, seconds: float) -> None: ...


@dataclass(slots=True, eq=False)
class _Run:
    """One request while it is carried out."""

    request: ReadRequest
    figure_bytes_left: int
    events: asyncio.Queue[PipelineEvent] = field(default_factory=lambda: asyncio.Queue(_QUEUED_EVENTS))


def is_for_all(failure: PageFailure | None) -> bool:
    """Whether a failure is the document's, so that asking for its other pages is of no use."""
    return failure is not None and (failure.status in _FOR_ALL or failure.code == _QUOTA)


def wants_page_image(request: ReadRequest, index: int, image: DrawnPage) -> bool:
    """Whether a stream shows this page as it was drawn."""
    is_wanted = request.options.stream and request.options.include_page_images
    return is_wanted and index in request.pages[:_MAX_PICTURES] and len(image.data) <= _MAX_PICTURE_BYTES


class Pipeline:
    """Reads documents. One per process; documents share its renderer and its connections."""

    def __init__(self, renderer: Renderer, reader: PageReader, settings: OcrSettings, observer: Observer) -> None:
        self._renderer = renderer
        self._reader = reader
        self._settings = settings
        self._observer = observer

    async def read(self, request: ReadRequest) -> AsyncGenerator[PipelineEvent]:
        """All pages, their events in the order in which they happen; each page ends once.

        When one page has failed for a reason that is the document's, those that have not begun fail with the same.
        Whoever stops listening (`aclose`) ends what is under way.
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
        """Of a page that its owner knows of: one that was read for nobody is none."""
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
        """Figures as base64; one that cannot be cut out is left out, and so are those that the document has no room
        for any more: where a model puts figures is not known to be sane."""
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
    """The next event, None after the last. Raises what a worker has failed with."""
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
