"""`POST /v1/ocr`: a document read while its client waits, whole or as a stream of events; and what that would cost."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request

from serving.errors import (
    AuthenticationError,
    EngineError,
    PermissionDeniedError,
    QuotaExceededError,
    ServingError,
)
from serving.http.disconnects import ClientPresence
from serving.http.reply import Reply
from serving.ocr.api.service import OcrService
from serving.ocr.api.uploads import Submission
from serving.ocr.reading.documents import Order, PageDelta, PageDrawn, PageEnded, PageStarted, PipelineEvent, is_for_all
from serving.ocr.reading.options import Options
from serving.ocr.reading.page_json import PageResult, show_failure, show_usage
from serving.ocr.reading.pages import Failure, Usage
from serving.ocr.reading.quotes import show_quote
from serving.ocr.reading.router_client import Caller
from serving.ocr.rendering.pool import Document
from serving.ocr_client.page_ranges import select_pages

_Act = Callable[[Document, Submission, Caller, Reply], Awaitable[None]]


@dataclass(slots=True)
class _Totals:
    """What the pages come to."""

    usage: Usage = field(default_factory=Usage)
    pages: list[PageResult] = field(default_factory=list)
    num_failed: int = 0

    def add(self, result: PageResult) -> None:
        self.usage += result.usage
        self.num_failed += result.is_failed

    def shown(self, num_pages: int) -> dict[str, Any]:
        return show_usage(self.usage, num_pages, self.num_failed)


class DocumentsRoute:
    """Answers for whoever has a key that the router takes."""

    def __init__(self, service: OcrService) -> None:
        self._service = service

    async def answer(self, request: Request, reply: Reply) -> None:
        """One document.

        Raises:
            ServingError: what is wrong with it as a whole.
        """
        await self._take(request, reply, self._read)

    async def answer_quote(self, request: Request, reply: Reply) -> None:
        """What one document would cost, none of it read by a model.

        Raises:
            ServingError: what is wrong with it as a whole.
        """
        await self._take(request, reply, self._quote)

    async def _take(self, request: Request, reply: Reply, act: _Act) -> None:
        service = self._service
        caller = await service.callers.identify(request.headers.get("authorization"))
        async with (
            service.admitting(request, caller),
            service.intake.receive(request, caller) as submission,
            ClientPresence(request.receive),
        ):
            document = await service.renderer.open(submission.file, caller.owner)
            await act(document, submission, caller, reply)

    def _select(self, document: Document, options: Options) -> list[int]:
        return select_pages(options.pages, document.num_pages, self._service.settings.ocr.render.max_pages)

    async def _quote(self, document: Document, submission: Submission, caller: Caller, reply: Reply) -> None:
        options, ocr = submission.options, self._service.settings.ocr
        pages = self._select(document, options)
        question = options.question(ocr, caller.api_key)
        quoted = await self._service.quoter.quote(document, pages, options.dpi, question)
        shown = show_quote(options.model, quoted) | {"document": show_document(document, submission.size_bytes)}
        await reply.send_body(200, orjson.dumps(shown))

    async def _read(self, document: Document, submission: Submission, caller: Caller, reply: Reply) -> None:
        options, ocr = submission.options, self._service.settings.ocr
        pages = self._select(document, options)
        answer_id = f"ocr-{uuid.uuid4().hex}"
        order = Order(document, pages, options, options.question(ocr, caller.api_key), answer_id)
        head = {"model": options.model, "document": show_document(document, submission.size_bytes)}
        self._service.metrics.see_document(document.format, "stream" if options.stream else "request")
        if options.stream:
            await self._stream(order, {"type": "document", "id": answer_id, **head, "pages": pages}, reply)
            return
        created = int(time.time())
        frame = {"id": answer_id, "object": "ocr.result", "created": created, **head}
        await reply.send_body(200, orjson.dumps(frame | await self._collect(order)))

    async def _collect(self, order: Order) -> dict[str, Any]:
        totals = _Totals()
        async with contextlib.aclosing(self._service.pipeline.read(order)) as events:
            async for event in events:
                if isinstance(event, PageEnded):
                    refuse_whole(event.result.failure, any(not page.is_failed for page in totals.pages))
                    totals.add(event.result)
                    self._service.pipeline.count(event)
                    totals.pages.append(event.result)
        totals.pages.sort(key=lambda page: page.index)
        return {"pages": [page.shown for page in totals.pages], "usage": totals.shown(len(totals.pages))}

    async def _stream(self, order: Order, head: dict[str, Any], reply: Reply) -> None:
        """Nothing is sent before the first page has begun, so that a refusal of the whole still has its status."""
        totals = _Totals()
        num_pages = 0
        has_text = False
        async with contextlib.aclosing(self._service.pipeline.read(order)) as events:
            async for event in _delay_starts(events):
                if isinstance(event, PageEnded):
                    refuse_whole(event.result.failure, has_text)
                    totals.add(event.result)
                    self._service.pipeline.count(event)
                    num_pages += 1
                has_text = has_text or isinstance(event, PageDelta)
                if not reply.has_begun:
                    await reply.start_stream()
                    await reply.write(_frame(head))
                await reply.write(_frame(_show_event(event)))
        await reply.end(_frame({"type": "result", "usage": totals.shown(num_pages)}) + b"data: [DONE]\n\n")


def show_document(document: Document, size_bytes: int) -> dict[str, Any]:
    return {"format": document.format.value, "num_pages": document.num_pages, "size_bytes": size_bytes}


def refuse_whole(failure: Failure | None, has_begun: bool) -> None:
    """Raise what the router refused the document with, when nothing of it was read before."""
    if failure is None or has_begun or not is_for_all(failure):
        return
    error: ServingError
    if failure.code == "insufficient_quota":
        error = QuotaExceededError(failure.message)
    elif failure.status == 401:
        error = AuthenticationError(failure.message, code=failure.code)
    elif failure.status == 403:
        error = PermissionDeniedError(failure.message, code=failure.code)
    else:
        shown = show_failure(failure) or {}
        kind = str(shown.get("type"))
        error = EngineError(failure.status or 400, failure.message, type=kind, param="model", code=failure.code)
    raise error


async def _delay_starts(events: AsyncIterator[PipelineEvent]) -> AsyncIterator[PipelineEvent]:
    """Hold back what says no more than that pages begin, until there is more to say."""
    held: list[PipelineEvent] = []
    is_open = False
    async for event in events:
        if is_open:
            yield event
        elif isinstance(event, PageStarted | PageDrawn):
            held.append(event)
        else:
            # A page that failed goes first: it may be the end of all.
            is_open = True
            if isinstance(event, PageEnded) and is_for_all(event.result.failure):
                yield event
                continue
            for earlier in held:
                yield earlier
            held.clear()
            yield event


def _show_event(event: PipelineEvent) -> dict[str, Any]:
    if isinstance(event, PageStarted):
        shown = {"type": "page.started", "index": event.index, "try": event.number, "mode": event.mode}
        return {**shown, "dimensions": event.dimensions.shown()}
    if isinstance(event, PageDrawn):
        image = event.image
        shown = {"type": "page.image", "index": event.index, "image_url": image.as_url()}
        return {**shown, "width": image.width, "height": image.height}
    if isinstance(event, PageDelta):
        return {"type": "page.delta", "index": event.index, "text": event.text}
    kind = "page.failed" if event.result.is_failed else "page.completed"
    return {"type": kind, "index": event.result.index, "page": event.result.shown}


def _frame(event: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"
