"""Reads a document's pages, several in parallel: each is rendered in a worker process and read through the router.

A page's image is held only while the router has it, and events wait in a queue of bounded length. A document of a
thousand pages, or a client that reads slowly, therefore needs no more memory than a short document.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import pybase64

from serving.errors import ServingError
from serving.ocr.reading.pages import Delta, PageFailure, PageReader, PageReading, PageUsage, TryStarted
from serving.ocr.reading.request import ReadRequest
from serving.ocr.reading.results import (
    PageResult,
    PlacedPage,
    as_failure,
    build_page,
    build_unread_page,
    find_figures,
    find_texts,
    measure,
    parse_layer,
    parse_reading,
)
from serving.ocr.rendering.drawing import WarningKind
from serving.ocr.rendering.pool import DrawnPage, PageLayer, Renderer
from serving.ocr.text.comparison import compare_texts
from serving.ocr.text.documents import PlacedText
from serving.ocr.text.layout import Box, LayoutBlock
from serving.ocr.text.markdown import render_text
from serving.ocr_api.options import PLACED_FORMATS, RESOLUTION_MODES
from serving.ocr_api.shapes import PageDelta, PageImage, PageStarted, PageWarning, TextLayerCheck
from serving.settings.ocr import OcrSettings

_QUEUED_EVENTS = 256
"""Of a stream, so that a client which pauses does not hold up pages. Otherwise events are stored or collected, and no
page runs ahead of that: what was read and not stored has to be read again if the service dies."""
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

    def see_page(self, *, is_failed: bool, num_retries: int, seconds: float, mode: str) -> None: ...

    def see_warning(self, kind: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Run:
    """The state of one request while it runs."""

    request: ReadRequest
    figure_bytes_left: int
    figures_left: int
    events: asyncio.Queue[PipelineEvent] = field(init=False)

    def __post_init__(self) -> None:
        self.events = asyncio.Queue(_QUEUED_EVENTS if self.request.options.stream else 1)

    async def report(self, event: PageStarted | PageImage | PageDelta) -> None:
        """Pass on the progress of a page, which only streams show."""
        if self.request.options.stream:
            await self.events.put(event)


def is_for_all(failure: PageFailure | None) -> bool:
    """Whether every other page of the document would fail for the same reason."""
    return failure is not None and (failure.status in _FOR_ALL or failure.code == _QUOTA)


def wants_page_image(request: ReadRequest, index: int, image: DrawnPage) -> bool:
    """Whether the stream sends this page's image."""
    is_wanted = request.options.stream and request.options.include_page_images
    return is_wanted and index in request.pages[:_MAX_PICTURES] and len(image.data) <= _MAX_PICTURE_BYTES


def warn_of_layer(image: DrawnPage, kind: WarningKind, message: str) -> DrawnPage:
    """The page with a further warning."""
    return replace(image, warnings=(*image.warnings, PageWarning(code=kind.value, message=message)))


class Pipeline:
    """Reads documents. One per process; all documents share its renderer and connections."""

    def __init__(self, renderer: Renderer, reader: PageReader, settings: OcrSettings, observer: Observer) -> None:
        self._renderer = renderer
        self._reader = reader
        self._settings = settings
        self._observer = observer

    async def read(self, request: ReadRequest) -> AsyncGenerator[PipelineEvent]:
        """Read all pages and yield their events as they happen; every page ends exactly once. Only a stream gets the
        events of a page before its end.

        When a page fails for a reason that applies to the whole document, pages that have not started fail with the
        same reason. Closing the generator cancels what is in flight.
        """
        limit = request.options.image_limit
        run = _Run(request, self._settings.max_figure_bytes, sys.maxsize if limit is None else limit)
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
        result, page = ended.result, ended.result.page
        mode = page.source or page.mode or ""
        mode = mode if page.source or mode in RESOLUTION_MODES else "none"
        self._observer.see_page(is_failed=result.is_failed, num_retries=page.retries, seconds=ended.seconds, mode=mode)
        for warning in page.warnings or ():
            self._observer.see_warning(warning.code)

    async def _read_page(self, run: _Run, index: int) -> PageResult:
        request, started_s = run.request, time.monotonic()
        layer: PageLayer | None = None
        try:
            image = await self._renderer.draw(request.document, index, request.options.dpi)
            if request.options.text_layer != "off":
                layer = await self._renderer.read_layer(request.document, index)
        except ServingError as error:
            return build_unread_page(index, as_failure(error), request.charged.get(index, 0))
        self._observer.see_render(time.monotonic() - started_s)
        if layer is None:
            return await self._read_image(run, index, image)
        if layer.flaw is not None:
            warned = warn_of_layer(image, WarningKind.TEXT_LAYER_UNUSED, f"The text layer was not used: {layer.flaw}.")
            return await self._read_image(run, index, warned)
        if request.options.text_layer == "prefer":
            return await self._take_layer(run, index, image, layer)
        return await self._read_image(run, index, image, layer)

    async def _take_layer(self, run: _Run, index: int, image: DrawnPage, layer: PageLayer) -> PageResult:
        """Take the page's text from the PDF, without a model."""
        started = PageStarted(index=index, dimensions=measure(image))
        await run.report(started)
        await self._put_picture(run, index, image)
        await run.report(PageDelta(index=index, text=layer.text))
        usage = PageUsage(cost_nanodollars=run.request.charged.get(index, 0))
        reading = PageReading((layer.text,), usage, num_tries=1, mode=None)
        figures: list[tuple[Box, str]] | None = [] if run.request.options.include_images else None
        blocks = parse_layer(layer, image.width, image.height)
        placed = await self._place(run, index, blocks)
        result = build_page(index, reading, blocks, image, run.request.options, figures, placed)
        return replace(result, page=result.page.model_copy(update={"source": "text_layer"}))

    async def _read_image(self, run: _Run, index: int, image: DrawnPage, layer: PageLayer | None = None) -> PageResult:
        """Read a page, part after part if it is a strip, and compare it with its text layer, if one is given."""
        reading: PageReading | None = None
        for part in image.parts or (None,):
            try:
                shown = image if part is None else await self._draw_part(run, index, part)
            except ServingError as error:
                failure = as_failure(error)
                if reading is None:
                    return build_unread_page(index, failure, run.request.charged.get(index, 0))
                reading = replace(reading, failure=failure)
                break
            reading = await self._read_part(run, index, image, shown, reading)
            if reading.failure is not None:
                break
        assert reading is not None  # every page has a part
        blocks = parse_reading(reading, image)
        check: TextLayerCheck | None = None
        if layer is not None and reading.failure is None:
            check = await asyncio.to_thread(compare_texts, layer.text, render_text(blocks))
            if check.differences:
                message = f"The text layer and the reading agree in {check.agreement:.0%} of the words."
                image = warn_of_layer(image, WarningKind.TEXT_LAYER_DIFFERS, message)
        figures = await self._cut_figures(run, index, blocks) if run.request.options.include_images else None
        placed = await self._place(run, index, blocks) if reading.failure is None else None
        result = build_page(index, reading, blocks, image, run.request.options, figures, placed)
        if check is None:
            return result
        return replace(result, page=result.page.model_copy(update={"text_layer": check}))

    async def _place(self, run: _Run, index: int, blocks: Sequence[LayoutBlock]) -> PlacedPage | None:
        """Place the words of a page, for the formats that need it. A page that cannot be drawn again has no places."""
        options, document = run.request.options, run.request.document
        if options.format not in PLACED_FORMATS:
            return None
        texts = find_texts(blocks)
        try:
            if options.format == "pdf":
                return PlacedPage(pdf=await self._renderer.build_pdf(document, index, options.dpi, texts))
            return PlacedPage(await self._renderer.place(document, index, options.dpi, texts))
        except ServingError:
            return PlacedPage([PlacedText(text, None) for text, _ in texts])

    async def _draw_part(self, run: _Run, index: int, part: Box) -> DrawnPage:
        return await self._renderer.draw(run.request.document, index, run.request.options.dpi, part)

    async def _read_part(
        self, run: _Run, index: int, image: DrawnPage, shown: DrawnPage, before: PageReading | None
    ) -> PageReading:
        """Read a page, or the part of it that is `shown`; `before` is the reading of earlier parts."""
        num_before = before.num_tries if before is not None else 0
        reading: PageReading | None = None
        async with contextlib.aclosing(self._reader.read(shown, run.request, index, before)) as read:
            async for event in read:
                if isinstance(event, TryStarted):
                    if before is None or event.number > num_before + 1:
                        dimensions = measure(image)
                        await run.report(
                            PageStarted(index=index, attempt=event.number, mode=event.mode, dimensions=dimensions)
                        )
                    if event.number == 1:
                        await self._put_picture(run, index, image)
                    if before is not None:
                        # What earlier parts said: after another attempt it has to be said again.
                        is_retry = event.number > num_before + 1
                        text = "\n\n".join((*before.texts, "")) if is_retry else "\n\n"
                        await run.report(PageDelta(index=index, text=text))
                elif isinstance(event, Delta):
                    await run.report(PageDelta(index=index, text=event.text))
                else:
                    reading = event
        assert reading is not None  # a reader's last event
        return reading

    async def _put_picture(self, run: _Run, index: int, image: DrawnPage) -> None:
        if wants_page_image(run.request, index, image):
            await run.report(PageImage(index=index, image_url=image.as_url(), width=image.width, height=image.height))

    async def _cut_figures(self, run: _Run, index: int, blocks: Sequence[LayoutBlock]) -> list[tuple[Box, str]]:
        """Figures with their images as base64.

        Figures that cannot be cut out, or exceed the document's budget of bytes, are left out: the boxes come from the
        model and may be anywhere.
        """
        figures = []
        least = run.request.options.image_min_size or 0
        for box in find_figures(blocks, self._settings.max_figures, least):
            if not run.figures_left:
                break
            run.figures_left -= 1  # before drawing: pages are read side by side
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
