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
from serving.ocr.reading.documents import (
    PageDelta,
    PageDrawn,
    PageEnded,
    PageStarted,
    PipelineEvent,
    ReadRequest,
    is_for_all,
)
from serving.ocr.reading.options import ReadOptions
from serving.ocr.reading.page_json import PageResult, failure_to_json, usage_to_json
from serving.ocr.reading.pages import PageFailure, PageUsage
from serving.ocr.reading.quotes import quote_answer_to_json
from serving.ocr.reading.router_client import Caller
from serving.ocr.rendering.pool import OpenedDocument
from serving.ocr_client.page_ranges import select_pages

_Act = Callable[[OpenedDocument, Submission, Caller, Reply], Awaitable[None]]


@dataclass(slots=True)
class _Totals:
    """What the pages come to."""

    usage: PageUsage = field(default_factory=PageUsage)
    pages: list[PageResult] = field(default_factory=list)
    num_failed: int = 0

    def add(self, result: PageResult) -> None:
        self.usage += result.usage
        self.num_failed += result.is_failed

    def to_json(self, num_pages: int) -> dict[str, Any]:
        return usage_to_json(self.usage, num_pages, self.num_failed)


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
            service.uploads.receive(request, caller) as submission,
            ClientPresence(request.receive),
        ):
            document = await service.renderer.open(submission.file, caller.owner)
            await act(document, submission, caller, reply)

    def _select(self, document: OpenedDocument, options: ReadOptions) -> list[int]:
        return select_pages(options.pages, document.num_pages, self._service.settings.ocr.render.max_pages)

    async def _quote(self, document: OpenedDocument, submission: Submission, caller: Caller, reply: Reply) -> None:
        options, ocr = submission.options, self._service.settings.ocr
        pages = self._select(document, options)
        page_request = options.page_request(ocr, caller.api_key)
        quoted = await self._service.quoter.quote(document, pages, options.dpi, page_request)
        body = quote_answer_to_json(options.model, quoted) | {
            "document": document_to_json(document, submission.size_bytes)
        }
        await reply.send_body(200, orjson.dumps(body))

    async def _read(self, document: OpenedDocument, submission: Submission, caller: Caller, reply: Reply) -> None:
        options, ocr = submission.options, self._service.settings.ocr
        pages = self._select(document, options)
        answer_id = f"ocr-{uuid.uuid4().hex}"
        request = ReadRequest(document, pages, options, options.page_request(ocr, caller.api_key), answer_id)
        head = {"model": options.model, "document": document_to_json(document, submission.size_bytes)}
        self._service.metrics.see_document(document.format, "stream" if options.stream else "request")
        if options.stream:
            await self._stream(request, {"type": "document", "id": answer_id, **head, "pages": pages}, reply)
            return
        created = int(time.time())
        frame = {"id": answer_id, "object": "ocr.result", "created": created, **head}
        await reply.send_body(200, orjson.dumps(frame | await self._collect(request)))

    async def _collect(self, request: ReadRequest) -> dict[str, Any]:
        totals = _Totals()
        async with contextlib.aclosing(self._service.pipeline.read(request)) as events:
            async for event in events:
                if isinstance(event, PageEnded):
                    refuse_whole(event.result.failure, any(not page.is_failed for page in totals.pages))
                    totals.add(event.result)
                    self._service.pipeline.count(event)
                    totals.pages.append(event.result)
        totals.pages.sort(key=lambda page: page.index)
        return {"pages": [page.body for page in totals.pages], "usage": totals.to_json(len(totals.pages))}

    async def _stream(self, request: ReadRequest, head: dict[str, Any], reply: Reply) -> None:
        """Nothing is sent before the first page has begun, so that a refusal of the whole still has its status."""
        totals = _Totals()
        num_pages = 0
        has_text = False
        async with contextlib.aclosing(self._service.pipeline.read(request)) as events:
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
                await reply.write(_frame(_event_to_json(event)))
        await reply.end(_frame({"type": "result", "usage": totals.to_json(num_pages)}) + b"data: [DONE]\n\n")


def document_to_json(document: OpenedDocument, size_bytes: int) -> dict[str, Any]:
    return {"format": document.format.value, "num_pages": document.num_pages, "size_bytes": size_bytes}


def refuse_whole(failure: PageFailure | None, has_begun: bool) -> None:
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
        body = failure_to_json(failure) or {}
        kind = str(body.get("type"))
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


def _event_to_json(event: PipelineEvent) -> dict[str, Any]:
    if isinstance(event, PageStarted):
        body = {"type": "page.started", "index": event.index, "try": event.number, "mode": event.mode}
        return {**body, "dimensions": event.dimensions.to_json()}
    if isinstance(event, PageDrawn):
        image = event.image
        body = {"type": "page.image", "index": event.index, "image_url": image.as_url()}
        return {**body, "width": image.width, "height": image.height}
    if isinstance(event, PageDelta):
        return {"type": "page.delta", "index": event.index, "text": event.text}
    kind = "page.failed" if event.result.is_failed else "page.completed"
    return {"type": kind, "index": event.result.index, "page": event.result.body}


def _frame(event: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"
