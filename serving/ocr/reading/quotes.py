"""Quotes what reading a document would cost: each page is rendered, and the router quotes the request to read it.

No engine is involved. The quote covers one attempt per page; a page that has to be read again costs more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from serving.billing.quotes import Quote, quote_from_json, quote_to_json, sum_quotes
from serving.errors import InternalError, RenderError, ServingError
from serving.ocr.reading.documents import is_for_all
from serving.ocr.reading.pages import PageFailure, build_body
from serving.ocr.reading.request import ReadRequest
from serving.ocr.reading.results import as_failure, build_error, measure
from serving.ocr.reading.router_client import Callers
from serving.ocr.rendering.pool import Renderer
from serving.ocr_api.shapes import Dimensions, DocumentFacts, DocumentQuote, QuotedPage
from serving.settings.ocr import OcrSettings


@dataclass(frozen=True, slots=True)
class PageQuote:
    """What one page would cost, or why it would fail."""

    index: int
    dimensions: Dimensions | None
    quote: Quote | None
    failure: PageFailure | None = None


class Quoter:
    """Obtains quotes. One per process; all documents share its renderer and connections."""

    def __init__(self, renderer: Renderer, callers: Callers, settings: OcrSettings) -> None:
        self._renderer = renderer
        self._callers = callers
        self._settings = settings

    async def quote(self, request: ReadRequest) -> list[PageQuote]:
        """Quotes of all pages, in their order.

        Raises:
            ServingError: every page would fail: the router refuses the key or the model, or is unavailable.
        """
        waiting = iter(request.pages)
        found: list[PageQuote] = []

        async def quote_next_pages() -> None:
            for index in waiting:
                found.append(await self._quote_page(request, index))

        num_workers = min(self._settings.pages_in_parallel, len(request.pages))
        workers = [asyncio.create_task(quote_next_pages()) for _ in range(num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return sorted(found, key=lambda page: page.index)

    async def _quote_page(self, request: ReadRequest, index: int) -> PageQuote:
        document, options = request.document, request.options
        try:
            image = await self._renderer.draw(document, index, options.dpi)
            if options.text_layer == "prefer" and (await self._renderer.read_layer(document, index)).flaw is None:
                return PageQuote(index, measure(image), sum_quotes(()))
        except RenderError as error:
            return PageQuote(index, None, None, as_failure(error))
        try:
            quotes = []
            for part in image.parts or (None,):
                shown = image if part is None else await self._renderer.draw(document, index, options.dpi, part)
                body = build_body(shown.as_url(), request, options.mode)
                quotes.append(quote_from_json(await self._callers.fetch_quote(request.api_key, body)))
        except ServingError as error:
            failure = as_failure(error)
            if error.http_status >= 500 or is_for_all(failure):
                raise
            return PageQuote(index, measure(image), None, failure)
        except ValueError as error:
            raise InternalError("The router's answer is not a quote.", 502, code="bad_answer") from error
        return PageQuote(index, measure(image), quotes[0] if len(quotes) == 1 else sum_quotes(quotes))


def build_quote(model: str, pages: Sequence[PageQuote], document: DocumentFacts) -> DocumentQuote:
    """The API's answer: the sums, and the pages that they come from."""
    quotes = [page.quote for page in pages if page.quote is not None]
    return DocumentQuote(
        **quote_to_json(model, sum_quotes(quotes)),
        pages_quoted=len(quotes),
        pages_failed=len(pages) - len(quotes),
        pages=tuple(map(_build_page, pages)),
        document=document,
    )


def _build_page(page: PageQuote) -> QuotedPage:
    return QuotedPage(
        index=page.index,
        number=page.index + 1,
        status="quoted" if page.failure is None else "failed",
        dimensions=page.dimensions,
        error=build_error(page.failure) if page.failure is not None else None,
        **quote_to_json("", page.quote or sum_quotes(())),
    )
