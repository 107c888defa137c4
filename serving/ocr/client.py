"""Clients of the OCR service, for threads and for event loops: the same calls, the same types, the same errors.

    with OcrClient("http://127.0.0.1:8000", api_key="sk-...") as client:
        result = client.read(Path("report.pdf"), Options("nano"))
        print(result.pages[0].markdown, result.usage.estimated_cost)

Long documents go in jobs, which outlive the connection and the service's process:

        job = client.submit(Path("book.pdf"), Options("nano"), idempotency_key="book-1")
        for page in client.follow(job.id):
            print(page.number, page.content)

Requests are sent again as `RetryPolicy` says. One that may have been worked on is only sent again when that costs
nothing: never a whole document whose answer was lost. Errors: `serving.ocr.failures`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Any, Self

import httpx
import tenacity

from serving.ocr.exchange import (
    Answer,
    Document,
    EventReader,
    Format,
    Mode,
    Options,
    RetryPolicy,
    Source,
    build_document,
    build_retrying,
    check_answer,
    close_document,
    read_answer,
)
from serving.ocr.failures import from_httpx
from serving.ocr.results import Job, JobList, JobPages, ModelList, OcrResult, Page, StreamEvent

__all__ = ["AsyncOcrClient", "Document", "Format", "Mode", "OcrClient", "Options", "RetryPolicy", "Source"]

DEFAULT_URL = "http://127.0.0.1:8000"
_OCR, _JOBS = "/v1/ocr", "/v1/ocr/jobs"
_PAGES_AT_ONCE = 100
_CONNECT_S = 10.0


def _client_arguments(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return {
        "base_url": base_url.rstrip("/"),
        "headers": headers,
        "timeout": httpx.Timeout(timeout_s, connect=_CONNECT_S),
        "trust_env": False,  # a proxy in the environment gets neither the key nor the document
    }


def _key(idempotency_key: str | None) -> dict[str, str]:
    return {"idempotency-key": idempotency_key or uuid.uuid4().hex}


class OcrClient:
    """For programs without an event loop. May be shared between threads; close it, or use it as a context."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  frozen
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Args:
        base_url: of the router or the OCR service, without `/v1`.
        api_key: where the router wants one.
        timeout_s: longest silence of the service; a whole document's answer comes at the end of all its pages.
        retry: when requests are sent again.
        transport: httpx's, to reach the service some other way.
        """
        self._http = httpx.Client(transport=transport, **_client_arguments(base_url, api_key, timeout_s))
        self._retry = retry

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names that `Options.model` may have."""
        return self._ask("GET", "/v1/models", ModelList).names

    def read(self, source: Source, options: Options) -> OcrResult:
        """Read a document and wait for all of it. Pages that failed say why.

        Raises:
            OcrError: the document as a whole was not read.
            OSError: the file cannot be read.
        """
        fields = options.fields()
        return read_answer(self._send("POST", _OCR, document=(source, fields), is_repeatable=False), OcrResult)

    def stream(self, source: Source, options: Options) -> Generator[StreamEvent]:
        """Read a document and see its pages arrive. Whoever closes the generator ends the work.

        Raises:
            OcrError: the document as a whole was not read, or the stream broke off; never begun again by itself.
            OSError: the file cannot be read.
        """
        answer = self._send(
            "POST", _OCR, document=(source, {**options.fields(), "stream": True}), is_repeatable=False, is_stream=True
        )
        events = EventReader()
        try:
            for line in answer.iter_lines():
                if (event := events.take(line)) is not None:
                    yield event
                if events.is_done:
                    return
            events.finish()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise from_httpx(error) from error
        finally:
            answer.close()

    def submit(self, source: Source, options: Options, *, idempotency_key: str | None = None) -> Job:
        """Have a document read in a job.

        Args:
            source: the document.
            options: how to read it.
            idempotency_key: submitted again with the same one, the first job comes back. One is made up if none is
                given, so that tries of this call make one job.

        Raises:
            OcrError: it was refused.
            OSError: the file cannot be read.
        """
        answer = self._send("POST", _JOBS, document=(source, options.fields()), headers=_key(idempotency_key))
        return read_answer(answer, Job)

    def job(self, job_id: str) -> Job:
        return self._ask("GET", f"{_JOBS}/{job_id}", Job)

    def jobs(self, *, limit: int = 20, after: str | None = None) -> JobList:
        """Newest first; `after` is the last job of the list before."""
        return self._ask("GET", _JOBS, JobList, params={"limit": limit, **({"after": after} if after else {})})

    def job_pages(self, job_id: str, *, after: int = 0, limit: int = _PAGES_AT_ONCE) -> JobPages:
        """Pages that finished after the one whose `seq` is `after`."""
        return self._ask("GET", f"{_JOBS}/{job_id}/pages", JobPages, params={"after": after, "limit": limit})

    def follow(self, job_id: str, *, after: int = 0, poll_s: float = 1.0) -> Iterator[Page]:
        """Pages as they finish, until the job is over; its end is in `job`."""
        while True:
            is_over = self.job(job_id).status.is_over  # before its pages, so that none is missed
            has_more = True
            while has_more:
                pages = self.job_pages(job_id, after=after)
                yield from pages.data
                after, has_more = _next_after(pages, after)
            if is_over:
                return
            time.sleep(poll_s)

    def cancel(self, job_id: str) -> Job:
        """End it; pages that are finished stay."""
        return self._ask("POST", f"{_JOBS}/{job_id}/cancel", Job)

    def delete(self, job_id: str) -> None:
        """Forget it, with its document and results."""
        check_answer(self._send("DELETE", f"{_JOBS}/{job_id}"))

    def _ask(self, method: str, path: str, kind: type[Answer], **arguments: Any) -> Answer:
        return read_answer(self._send(method, path, **arguments), kind)

    def _send(
        self,
        method: str,
        path: str,
        *,
        document: tuple[Source, dict[str, Any]] | None = None,
        is_repeatable: bool = True,
        is_stream: bool = False,
        **arguments: Any,
    ) -> httpx.Response:
        retrying = tenacity.Retrying(**build_retrying(self._retry, is_repeatable=is_repeatable))
        return retrying(self._try, method, path, document, is_stream, arguments)

    def _try(
        self,
        method: str,
        path: str,
        document: tuple[Source, dict[str, Any]] | None,
        is_stream: bool,
        arguments: dict[str, Any],
    ) -> httpx.Response:
        body = build_document(*document) if document is not None else {}
        try:
            answer = self._http.send(self._http.build_request(method, path, **body, **arguments), stream=True)
            if not is_stream or not answer.is_success:
                with contextlib.closing(answer):
                    answer.read()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise from_httpx(error) from error
        finally:
            close_document(body)
        check_answer(answer)
        return answer


class AsyncOcrClient:
    """`OcrClient` for one event loop."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  frozen
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As of `OcrClient`."""
        self._http = httpx.AsyncClient(transport=transport, **_client_arguments(base_url, api_key, timeout_s))
        self._retry = retry

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """See `OcrClient.models`."""
        return (await self._ask("GET", "/v1/models", ModelList)).names

    async def read(self, source: Source, options: Options) -> OcrResult:
        """See `OcrClient.read`."""
        answer = await self._send("POST", _OCR, document=(source, options.fields()), is_repeatable=False)
        return read_answer(answer, OcrResult)

    async def stream(self, source: Source, options: Options) -> AsyncGenerator[StreamEvent]:
        """See `OcrClient.stream`."""
        fields = {**options.fields(), "stream": True}
        answer = await self._send("POST", _OCR, document=(source, fields), is_repeatable=False, is_stream=True)
        events = EventReader()
        try:
            async for line in answer.aiter_lines():
                if (event := events.take(line)) is not None:
                    yield event
                if events.is_done:
                    return
            events.finish()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise from_httpx(error) from error
        finally:
            await answer.aclose()

    async def submit(self, source: Source, options: Options, *, idempotency_key: str | None = None) -> Job:
        """See `OcrClient.submit`."""
        document = (source, options.fields())
        return read_answer(await self._send("POST", _JOBS, document=document, headers=_key(idempotency_key)), Job)

    async def job(self, job_id: str) -> Job:
        return await self._ask("GET", f"{_JOBS}/{job_id}", Job)

    async def jobs(self, *, limit: int = 20, after: str | None = None) -> JobList:
        """See `OcrClient.jobs`."""
        return await self._ask("GET", _JOBS, JobList, params={"limit": limit, **({"after": after} if after else {})})

    async def job_pages(self, job_id: str, *, after: int = 0, limit: int = _PAGES_AT_ONCE) -> JobPages:
        """See `OcrClient.job_pages`."""
        return await self._ask("GET", f"{_JOBS}/{job_id}/pages", JobPages, params={"after": after, "limit": limit})

    async def follow(self, job_id: str, *, after: int = 0, poll_s: float = 1.0) -> AsyncIterator[Page]:
        """See `OcrClient.follow`."""
        while True:
            is_over = (await self.job(job_id)).status.is_over
            has_more = True
            while has_more:
                pages = await self.job_pages(job_id, after=after)
                for page in pages.data:
                    yield page
                after, has_more = _next_after(pages, after)
            if is_over:
                return
            await asyncio.sleep(poll_s)

    async def cancel(self, job_id: str) -> Job:
        """See `OcrClient.cancel`."""
        return await self._ask("POST", f"{_JOBS}/{job_id}/cancel", Job)

    async def delete(self, job_id: str) -> None:
        """See `OcrClient.delete`."""
        check_answer(await self._send("DELETE", f"{_JOBS}/{job_id}"))

    async def _ask(self, method: str, path: str, kind: type[Answer], **arguments: Any) -> Answer:
        return read_answer(await self._send(method, path, **arguments), kind)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        document: tuple[Source, dict[str, Any]] | None = None,
        is_repeatable: bool = True,
        is_stream: bool = False,
        **arguments: Any,
    ) -> httpx.Response:
        retrying = tenacity.AsyncRetrying(**build_retrying(self._retry, is_repeatable=is_repeatable))
        return await retrying(self._try, method, path, document, is_stream, arguments)

    async def _try(
        self,
        method: str,
        path: str,
        document: tuple[Source, dict[str, Any]] | None,
        is_stream: bool,
        arguments: dict[str, Any],
    ) -> httpx.Response:
        body = build_document(*document) if document is not None else {}
        try:
            answer = await self._http.send(self._http.build_request(method, path, **body, **arguments), stream=True)
            if not is_stream or not answer.is_success:
                async with contextlib.aclosing(answer):
                    await answer.aread()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise from_httpx(error) from error
        finally:
            close_document(body)
        check_answer(answer)
        return answer


def _next_after(pages: JobPages, after: int) -> tuple[int, bool]:
    """The last page that was seen, and whether there are more."""
    seen = max((page.seq for page in pages.data if page.seq is not None), default=after)
    return seen, pages.has_more and seen > after
