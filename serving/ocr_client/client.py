"""Clients of the OCR service, synchronous and asynchronous, with the same methods, types and errors.

    with OcrClient("http://127.0.0.1:8000", api_key="sk-...") as client:
        result = client.read(Path("report.pdf"), ReadOptions("nano"))
        print(result.pages[0].markdown, result.usage.estimated_cost)

Long documents should be read in jobs, which survive the connection and restarts of the service:

        job = client.submit(Path("book.pdf"), ReadOptions("nano"), idempotency_key="book-1")
        for page in client.follow(job.id):
            print(page.number, page.content)

Requests are retried according to `RetryPolicy`, but never if that could be charged twice: a document whose answer was
lost is not sent again. Errors: `serving.ocr_client.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Any, Self

import httpx
import tenacity

from serving.ocr_api.options import Mode, PageFormat, ReadOptions
from serving.ocr_api.shapes import JobList, JobPages, ModelList, OcrJob, OcrPage, OcrResult, StreamEvent
from serving.ocr_client import requests
from serving.ocr_client.requests import Follower, OcrRequest
from serving.ocr_client.wire import (
    Answer,
    Document,
    EventReader,
    RetryPolicy,
    Source,
    build_retrying,
    check_answer,
    read_answer,
)

__all__ = ["AsyncOcrClient", "Document", "Mode", "OcrClient", "PageFormat", "ReadOptions", "RetryPolicy", "Source"]

DEFAULT_URL = "http://127.0.0.1:8000"
_PAGES_AT_ONCE = 100


class OcrClient:
    """The synchronous client. It may be shared between threads; close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  frozen
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            base_url: address of the router or the OCR service, with or without `/v1`.
            api_key: needed if the router requires keys.
            timeout_s: longest time in seconds without data; the answer to `read` arrives when all pages are done.
            retry: when requests are retried.
            transport: replaces httpx's own transport.
        """
        self._http = httpx.Client(transport=transport, **requests.client_arguments(base_url, api_key, timeout_s))
        self._retry = retry

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Valid values of `ReadOptions.model`."""
        return self.model_cards().names

    def model_cards(self) -> ModelList:
        """The models with what the service tells of them."""
        return self._ask(requests.models())

    def read(self, source: Source, options: ReadOptions) -> OcrResult:
        """Read a document and wait for all of its pages. Failed pages have an `error`.

        Raises:
            OcrError: the document as a whole could not be read.
            OSError: the file cannot be read.
        """
        return self._ask(requests.read(source, options))

    def stream(self, source: Source, options: ReadOptions) -> Generator[StreamEvent]:
        """Read a document and receive its pages as they are read. Closing the generator cancels the request.

        Raises:
            OcrError: the document as a whole could not be read, or the stream broke off; it is never retried.
            OSError: the file cannot be read.
        """
        events = EventReader()
        with contextlib.closing(self._send(requests.stream(source, options))) as answer, requests.own_errors():
            for line in answer.iter_lines():
                if (event := events.take(line)) is not None:
                    yield event
                if events.is_done:
                    return
            events.finish()

    def submit(self, source: Source, options: ReadOptions, *, idempotency_key: str | None = None) -> OcrJob:
        """Submit a document as a job.

        Args:
            source: the document.
            options: how to read it.
            idempotency_key: submitting again with the same key returns the first job. By default a random one is used,
                so that retries of this call create one job.

        Raises:
            OcrError: the submission was refused.
            OSError: the file cannot be read.
        """
        return self._ask(requests.submit(source, options, idempotency_key))

    def job(self, job_id: str) -> OcrJob:
        return self._ask(requests.job(job_id))

    def jobs(self, *, limit: int = 20, after: str | None = None) -> JobList:
        """Jobs, newest first; `after` is the id of the last job in the previous list."""
        return self._ask(requests.jobs(limit, after))

    def job_pages(self, job_id: str, *, after: int = 0, limit: int = _PAGES_AT_ONCE) -> JobPages:
        """Pages that finished after the one whose `seq` is `after`."""
        return self._ask(requests.job_pages(job_id, after, limit))

    def follow(self, job_id: str, *, after: int = 0, poll_s: float = 1.0) -> Iterator[OcrPage]:
        """Pages as they finish, until the job is over. How it ended is in `job`."""
        while True:
            is_over = self.job(job_id).status.is_over  # before fetching pages, so that none is missed
            follower = Follower(after)
            while follower.has_more:
                yield from follower.take(self.job_pages(job_id, after=follower.after))
            if is_over:
                return
            after = follower.after
            time.sleep(poll_s)

    def cancel(self, job_id: str) -> OcrJob:
        """Cancel a job; finished pages are kept."""
        return self._ask(requests.cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Delete a job with its document and results."""
        self._send(requests.delete(job_id))

    def _ask(self, request: OcrRequest[Answer]) -> Answer:
        return read_answer(self._send(request), request.kind)

    def _send(self, request: OcrRequest[Any]) -> httpx.Response:
        retrying = tenacity.Retrying(**build_retrying(self._retry, is_repeatable=request.is_repeatable))
        return retrying(self._try, request)

    def _try(self, request: OcrRequest[Any]) -> httpx.Response:
        with request.opened() as arguments:
            answer = self._http.send(self._http.build_request(**arguments), stream=True)
            if not request.is_stream or not answer.is_success:
                with contextlib.closing(answer):
                    answer.read()
        check_answer(answer)
        return answer


class AsyncOcrClient:
    """The asynchronous client, for one event loop. Methods are those of `OcrClient`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  frozen
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Arguments are those of `OcrClient`."""
        self._http = httpx.AsyncClient(transport=transport, **requests.client_arguments(base_url, api_key, timeout_s))
        self._retry = retry

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        return (await self.model_cards()).names

    async def model_cards(self) -> ModelList:
        return await self._ask(requests.models())

    async def read(self, source: Source, options: ReadOptions) -> OcrResult:
        return await self._ask(requests.read(source, options))

    async def stream(self, source: Source, options: ReadOptions) -> AsyncGenerator[StreamEvent]:
        events = EventReader()
        async with contextlib.aclosing(await self._send(requests.stream(source, options))) as answer:
            with requests.own_errors():
                async for line in answer.aiter_lines():
                    if (event := events.take(line)) is not None:
                        yield event
                    if events.is_done:
                        return
                events.finish()

    async def submit(self, source: Source, options: ReadOptions, *, idempotency_key: str | None = None) -> OcrJob:
        return await self._ask(requests.submit(source, options, idempotency_key))

    async def job(self, job_id: str) -> OcrJob:
        return await self._ask(requests.job(job_id))

    async def jobs(self, *, limit: int = 20, after: str | None = None) -> JobList:
        return await self._ask(requests.jobs(limit, after))

    async def job_pages(self, job_id: str, *, after: int = 0, limit: int = _PAGES_AT_ONCE) -> JobPages:
        return await self._ask(requests.job_pages(job_id, after, limit))

    async def follow(self, job_id: str, *, after: int = 0, poll_s: float = 1.0) -> AsyncIterator[OcrPage]:
        while True:
            is_over = (await self.job(job_id)).status.is_over
            follower = Follower(after)
            while follower.has_more:
                for page in follower.take(await self.job_pages(job_id, after=follower.after)):
                    yield page
            if is_over:
                return
            after = follower.after
            await asyncio.sleep(poll_s)

    async def cancel(self, job_id: str) -> OcrJob:
        return await self._ask(requests.cancel(job_id))

    async def delete(self, job_id: str) -> None:
        await self._send(requests.delete(job_id))

    async def _ask(self, request: OcrRequest[Answer]) -> Answer:
        return read_answer(await self._send(request), request.kind)

    async def _send(self, request: OcrRequest[Any]) -> httpx.Response:
        retrying = tenacity.AsyncRetrying(**build_retrying(self._retry, is_repeatable=request.is_repeatable))
        return await retrying(self._try, request)

    async def _try(self, request: OcrRequest[Any]) -> httpx.Response:
        with request.opened() as arguments:
            answer = await self._http.send(self._http.build_request(**arguments), stream=True)
            if not request.is_stream or not answer.is_success:
                async with contextlib.aclosing(answer):
                    await answer.aread()
        check_answer(answer)
        return answer
