"""What the pages of a document would cost: each is drawn, and the router asked with the request that would read it.

No engine hears of it. A page is quoted for one try; one that has to be read again costs so much more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.billing.quotes import Quote, quote_from_json, quote_to_json, sum_quotes
from serving.errors import InternalError, RenderError, ServingError
from serving.ocr.reading.documents import is_for_all
from serving.ocr.reading.page_json import Dimensions, as_failure, failure_to_json, measure
from serving.ocr.reading.pages import PageFailure, PageRequest, build_body
from serving.ocr.reading.router_client import Callers
from serving.ocr.rendering.pool import OpenedDocument, Renderer
from serving.settings.ocr import OcrSettings


@dataclass(frozen=True, slots=True)
class PageQuote:
    """One page: what it would cost, or why it would fail."""

    index: int
    dimensions: Dimensions | None
    quote: Quote | None
    failure: PageFailure | None = None


class Quoter:
    """Asks for quotes. One per process; documents share its renderer and its connections."""

    def __init__(self, renderer: Renderer, callers: Callers, settings: OcrSettings) -> None:
        self._renderer = renderer
        self._callers = callers
        self._settings = settings

    async def quote(
        self, document: OpenedDocument, pages: Sequence[int], dpi: int | None, request: PageRequest
    ) -> list[PageQuote]:
        """All pages, in their order.

        Raises:
            ServingError: what would befall every page: a key or model that the router does not take, or no router.
        """
        waiting = iter(pages)
        found: list[PageQuote] = []

        async def quote_next_pages() -> None:
            for index in waiting:
                found.append(await self._quote_page(document, index, dpi, request))

        workers = [
            asyncio.create_task(quote_next_pages()) for _ in range(min(self._settings.pages_in_parallel, len(pages)))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return sorted(found, key=lambda page: page.index)

    async def _quote_page(
        self, document: OpenedDocument, index: int, dpi: int | None, request: PageRequest
    ) -> PageQuote:
        try:
            image = await self._renderer.draw(document, index, dpi)
        except RenderError as error:
            return PageQuote(index, None, None, as_failure(error))
        dimensions = measure(document, image, dpi or self._settings.render.dpi)
        try:
            answer = await self._callers.fetch_quote(request.api_key, build_body(image.as_url(), request))
        except ServingError as error:
            failure = as_failure(error)
            if error.http_status >= 500 or is_for_all(failure):
                raise
            return PageQuote(index, dimensions, None, failure)
        try:
            return PageQuote(index, dimensions, quote_from_json(answer))
        except ValueError as error:
            raise InternalError("What the router answers is no quote.", 502, code="bad_answer") from error


def quote_answer_to_json(model: str, pages: Sequence[PageQuote]) -> dict[str, Any]:
    """As the router shows a request's: the sums, and the pages that they come from."""
    quotes = [page.quote for page in pages if page.quote is not None]
    counts = {"pages_quoted": len(quotes), "pages_failed": len(pages) - len(quotes)}
    return {
        **quote_to_json(model, sum_quotes(quotes)),
        **counts,
        "pages": [_page_quote_to_json(page) for page in pages],
    }


def _page_quote_to_json(page: PageQuote) -> dict[str, Any]:
    amounts = quote_to_json("", page.quote or sum_quotes(()))
    del amounts["object"], amounts["model"]
    return {
        "index": page.index,
        "number": page.index + 1,
        "status": "quoted" if page.failure is None else "failed",
        "dimensions": page.dimensions.to_json() if page.dimensions is not None else None,
        **amounts,
        "error": failure_to_json(page.failure),
    }
