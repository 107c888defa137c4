"""`POST /v1/ocr` reads a document while the client waits, as one answer or as a stream; `/v1/ocr/quote` its price."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

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
from serving.ocr.reading.documents import PageEnded, PipelineEvent, is_for_all
from serving.ocr.reading.pages import PageFailure, PageUsage
from serving.ocr.reading.quotes import build_quote
from serving.ocr.reading.request import ReadRequest, choose_page_base, choose_prompt
from serving.ocr.reading.results import PageResult, build_document, build_error, build_usage
from serving.ocr_api.joining import join_pages
from serving.ocr_api.page_ranges import select_pages
from serving.ocr_api.shapes import (
    DocumentFacts,
    DocumentStarted,
    JoinedPart,
    OcrPage,
    OcrResult,
    OcrUsage,
    PageDelta,
    PageFinished,
    PageImage,
    PageStarted,
    ResultFinished,
    StreamEvent,
)

_Act = Callable[[ReadRequest, DocumentFacts, Reply], Awaitable[None]]


@dataclass(slots=True)
class _Totals:
    """Totals over pages."""

    usage: PageUsage = field(default_factory=PageUsage)
    num_pages: int = 0
    num_failed: int = 0

    def add(self, result: PageResult) -> None:
        self.usage += result.usage
        self.num_pages += 1
        self.num_failed += result.is_failed

    def build_usage(self) -> OcrUsage:
        return build_usage(self.usage, self.num_pages, self.num_failed)


class DocumentsRoute:
    """Serves callers whose key the router accepts."""

    def __init__(self, service: OcrService) -> None:
        self._service = service

    async def answer(self, request: Request, reply: Reply) -> None:
        """Read one document.

        Raises:
            ServingError: the document as a whole cannot be read.
        """
        await self._take(request, reply, self._read)

    async def answer_quote(self, request: Request, reply: Reply) -> None:
        """Quote what reading a document would cost, without using a model.

        Raises:
            ServingError: the document as a whole cannot be quoted.
        """
        await self._take(request, reply, self._quote)

    async def _take(self, request: Request, reply: Reply, act: _Act) -> None:
        service, ocr = self._service, self._service.settings.ocr
        caller = await service.identify(request)
        async with (
            service.admitting(request, caller),
            service.uploads.receive(request, caller) as submission,
            ClientPresence(request.receive),
        ):
            options = submission.options
            document = await service.renderer.open(submission.file, caller.owner, options.password)
            read_request = ReadRequest(
                document=document,
                pages=select_pages(options.pages, document.num_pages, ocr.render.max_pages, options.page_base),
                options=options,
                prompt=choose_prompt(options, ocr),
                api_key=caller.api_key,
                request_id=f"ocr-{uuid.uuid4().hex}",
            )
            await act(read_request, build_document(document, submission.size_bytes), reply)

    async def _quote(self, request: ReadRequest, facts: DocumentFacts, reply: Reply) -> None:
        quoted = await self._service.quoter.quote(request)
        await reply.send_body(200, build_quote(request.options.model, quoted, facts).to_json())

    async def _read(self, request: ReadRequest, facts: DocumentFacts, reply: Reply) -> None:
        is_stream = request.options.stream
        self._service.metrics.see_document(request.document.format, "stream" if is_stream else "request")
        if is_stream:
            await self._stream(request, facts, reply)
        else:
            await reply.send_body(200, (await self._collect(request, facts)).to_json())

    async def _collect(self, request: ReadRequest, facts: DocumentFacts) -> OcrResult:
        created = int(time.time())
        totals, pages = _Totals(), list[OcrPage]()
        async with contextlib.aclosing(self._service.pipeline.read(request)) as events:
            async for event in events:
                if isinstance(event, PageEnded):
                    refuse_whole(event.result.failure, totals.num_pages > totals.num_failed)
                    totals.add(event.result)
                    self._service.pipeline.count(event)
                    pages.append(event.result.page)
        pages.sort(key=lambda page: page.index)
        return OcrResult(
            id=request.request_id,
            created=created,
            model=request.options.model,
            document=facts,
            pages=tuple(pages),
            joined=_join(pages) if request.options.join else None,
            page_base=choose_page_base(request.options),
            usage=totals.build_usage(),
        )

    async def _stream(self, request: ReadRequest, facts: DocumentFacts, reply: Reply) -> None:
        """Delay the response until the first page has started, so that a refusal of the whole gets its own status."""
        totals = _Totals()
        has_text = False
        kept: list[OcrPage] = []
        head = DocumentStarted(
            id=request.request_id, model=request.options.model, document=facts, pages=tuple(request.pages)
        )
        async with contextlib.aclosing(self._service.pipeline.read(request)) as events:
            async for event in _delay_starts(events):
                if isinstance(event, PageEnded):
                    refuse_whole(event.result.failure, has_text)
                    totals.add(event.result)
                    self._service.pipeline.count(event)
                    kept.extend([event.result.page] if request.options.join else [])
                has_text = has_text or isinstance(event, PageDelta)
                if not reply.has_begun:
                    await reply.start_stream()
                    await reply.write(_frame(head))
                await reply.write(_frame(_finish(event) if isinstance(event, PageEnded) else event))
        joined = _join(sorted(kept, key=lambda page: page.index)) if request.options.join else None
        await reply.end(_frame(ResultFinished(usage=totals.build_usage(), joined=joined)) + b"data: [DONE]\n\n")


def _join(pages: Sequence[OcrPage]) -> tuple[JoinedPart, ...]:
    return tuple(join_pages([(page.number, page.content) for page in pages if page.is_completed]))


def refuse_whole(failure: PageFailure | None, has_begun: bool) -> None:
    """Raise the router's refusal of the whole document, unless part of it has been read already."""
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
        kind = str(build_error(failure).type)
        error = EngineError(failure.status or 400, failure.message, type=kind, param="model", code=failure.code)
    raise error


async def _delay_starts(events: AsyncIterator[PipelineEvent]) -> AsyncIterator[PipelineEvent]:
    """Hold back the starts of pages until the first text or the first end of a page."""
    held: list[PipelineEvent] = []
    is_open = False
    async for event in events:
        if is_open:
            yield event
        elif isinstance(event, PageStarted | PageImage):
            held.append(event)
        else:
            # A failed page goes first: it may be a refusal of the whole document.
            is_open = True
            if isinstance(event, PageEnded) and is_for_all(event.result.failure):
                yield event
                continue
            for earlier in held:
                yield earlier
            held.clear()
            yield event


def _finish(event: PageEnded) -> PageFinished:
    page = event.result.page
    return PageFinished(type="page.completed" if page.is_completed else "page.failed", index=page.index, page=page)


def _frame(event: StreamEvent) -> bytes:
    return b"data: " + event.to_json() + b"\n\n"
