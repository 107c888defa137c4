"""A document's pages, several at a time: drawn in a worker process, read through the router, told as they come.

A page holds its picture only while it is with the router, and what is told waits in a queue of bounded length, so a
document of a thousand pages and a client that reads slowly cost no more memory than a short one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import pybase64

from serving.errors import ServingError
from serving.ocr.layout import Box, parse_layout
from serving.ocr.orders import Options
from serving.ocr.reader import Delta, Failure, PageReader, Question, Reading, TryStarted
from serving.ocr.renderer import Document, PageImage, Renderer
from serving.ocr.shown import Dimensions, PageResult, as_failure, find_figures, measure, show_page, show_unread
from serving.ocr_settings import OcrSettings

_QUEUED_EVENTS = 256
_MAX_PICTURES = 20
"""That a stream shows of one document; nobody looks at more, and they are large."""
_MAX_PICTURE_BYTES = 4 * 2**20
_FOR_ALL = frozenset({401, 403, 404})
"""Statuses of the router that every other page of the document would get as well."""
_QUOTA = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class PageStarted:
    """A try begins: whatever deltas of this page came before no longer count."""

    index: int
    number: int
    mode: str | None
    dimensions: Dimensions


@dataclass(frozen=True, slots=True)
class PageDrawn:
    """The page's picture, for streams that show it."""

    index: int
    image: PageImage


@dataclass(frozen=True, slots=True)
class PageDelta:
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class PageEnded:
    result: PageResult


PipelineEvent = PageStarted | PageDrawn | PageDelta | PageEnded


class Observer(Protocol):
    """Hears what pages come to: the metrics."""

    def see_render(self, seconds: float) -> None: ...

    def see_page(self, *, is_failed: bool, num_retries: int, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """Pages of one document, and how they are to be read."""

    document: Document
    pages: Sequence[int]
    options: Options
    question: Question
    request_id: str
    """Requests to the router are known by this, the page's number and that of the try."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, no further page is begun; those under way are finished."""


def is_for_all(failure: Failure | None) -> bool:
    """Whether a failure is the document's, so that asking for its other pages is of no use."""
    return failure is not None and (failure.status in _FOR_ALL or failure.code == _QUOTA)


def shows_picture(order: Order, index: int, image: PageImage) -> bool:
    """Whether a stream shows this page as it was drawn."""
    is_wanted = order.options.stream and order.options.include_page_images
    return is_wanted and index in order.pages[:_MAX_PICTURES] and len(image.data) <= _MAX_PICTURE_BYTES


class Pipeline:
    """Reads documents. One per process; documents share its renderer and its connections."""

    def __init__(self, renderer: Renderer, reader: PageReader, settings: OcrSettings, observer: Observer) -> None:
        self._renderer = renderer
        self._reader = reader
        self._settings = settings
        self._observer = observer

    async def read(self, order: Order) -> AsyncGenerator[PipelineEvent]:
        """All pages, their events in the order in which they happen; each page ends once.

        When one page has failed for a reason that is the document's, those that have not begun fail with the same.
        Whoever stops listening (`aclose`) ends what is under way.
        """
        events: asyncio.Queue[PipelineEvent] = asyncio.Queue(_QUEUED_EVENTS)
        waiting = iter(order.pages)
        shared: list[Failure] = []

        async def work() -> None:
            for index in waiting:
                if order.stop.is_set():
                    return
                result = show_unread(index, shared[0]) if shared else await self._read_page(order, index, events)
                if is_for_all(result.failure) and result.failure is not None:
                    shared.append(result.failure)
                await events.put(PageEnded(result))

        num_workers = min(self._settings.pages_in_parallel, len(order.pages))
        workers = [asyncio.create_task(work()) for _ in range(num_workers)]
        try:
            while (event := await _next(events, workers)) is not None:
                yield event
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _read_page(self, order: Order, index: int, events: asyncio.Queue[PipelineEvent]) -> PageResult:
        started_s = time.monotonic()
        try:
            image = await self._renderer.draw(order.document, index, order.options.dpi)
        except ServingError as error:
            result = show_unread(index, as_failure(error))
        else:
            self._observer.see_render(time.monotonic() - started_s)
            result = await self._read_image(order, index, image, events)
        self._observer.see_page(
            is_failed=result.is_failed, num_retries=result.shown["retries"], seconds=time.monotonic() - started_s
        )
        return result

    async def _read_image(
        self, order: Order, index: int, image: PageImage, events: asyncio.Queue[PipelineEvent]
    ) -> PageResult:
        dimensions = measure(order.document, image, order.options.dpi or self._settings.render.dpi)
        question = replace(order.question, request_id=f"{order.request_id}-p{index + 1}")
        reading: Reading | None = None
        async with contextlib.aclosing(self._reader.read(image, question)) as read:
            async for event in read:
                if isinstance(event, TryStarted):
                    await events.put(PageStarted(index, event.number, event.mode, dimensions))
                    if event.number == 1 and shows_picture(order, index, image):
                        await events.put(PageDrawn(index, image))
                elif isinstance(event, Delta):
                    await events.put(PageDelta(index, event.text))
                else:
                    reading = event
        assert reading is not None  # a reader's last event
        figures = await self._cut_figures(order, index, reading, dimensions) if order.options.include_images else None
        return show_page(index, reading, dimensions, order.options.format, figures)

    async def _cut_figures(
        self, order: Order, index: int, reading: Reading, dimensions: Dimensions
    ) -> list[tuple[Box, str]]:
        """Figures as base64; one that cannot be cut out is left out."""
        blocks = parse_layout(reading.text, dimensions.width, dimensions.height)
        figures = []
        for box in find_figures(blocks, self._settings.max_figures):
            with contextlib.suppress(ServingError):
                cut = await self._renderer.draw(order.document, index, order.options.dpi, box)
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
