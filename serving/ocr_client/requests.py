"""Requests to the OCR service as values that both clients send. Pure, except that documents are opened."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import httpx
import pydantic

from serving.ocr_api.options import ReadOptions
from serving.ocr_api.shapes import JobList, JobPages, ModelList, OcrJob, OcrPage, OcrResult
from serving.ocr_client.errors import from_httpx
from serving.ocr_client.wire import Answer, Source, build_document, close_document

_OCR, _JOBS = "/v1/ocr", "/v1/ocr/jobs"
_CONNECT_S = 10.0


class Nothing(pydantic.BaseModel):
    """The answer to requests that have none."""


@dataclass(frozen=True, slots=True)
class OcrRequest(Generic[Answer]):
    """One request, with the type of its answer."""

    method: str
    path: str
    kind: type[Answer]
    document: tuple[Source, dict[str, Any]] | None = None
    """The document, with the options as fields."""
    is_repeatable: bool = True
    """Whether it may be sent again even if it may have been carried out."""
    is_stream: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments for httpx."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[dict[str, Any]]:
        """Arguments of `httpx.Client.build_request` while the document is open. Converts httpx's errors.

        Raises:
            OSError: the document cannot be read.
            ConnectionLostError: no answer arrived.
        """
        body = build_document(*self.document) if self.document is not None else {}
        try:
            with own_errors():
                yield {"method": self.method, "url": self.path, **body, **self.arguments}
        finally:
            close_document(body)


def models() -> OcrRequest[ModelList]:
    return OcrRequest("GET", "/v1/models", ModelList)


def read(source: Source, options: ReadOptions) -> OcrRequest[OcrResult]:
    fields = replace(options, stream=False).fields()
    return OcrRequest("POST", _OCR, OcrResult, (source, fields), is_repeatable=False)


def stream(source: Source, options: ReadOptions) -> OcrRequest[OcrResult]:
    fields = replace(options, stream=True).fields()
    return OcrRequest("POST", _OCR, OcrResult, (source, fields), is_repeatable=False, is_stream=True)


def submit(source: Source, options: ReadOptions, idempotency_key: str | None) -> OcrRequest[OcrJob]:
    """Without an idempotency key a random one is used, so that the request may be retried."""
    headers = {"idempotency-key": idempotency_key or uuid.uuid4().hex}
    fields = replace(options, stream=False).fields()
    return OcrRequest("POST", _JOBS, OcrJob, (source, fields), arguments={"headers": headers})


def job(job_id: str) -> OcrRequest[OcrJob]:
    return OcrRequest("GET", f"{_JOBS}/{job_id}", OcrJob)


def jobs(limit: int, after: str | None) -> OcrRequest[JobList]:
    params = {"limit": limit, **({"after": after} if after else {})}
    return OcrRequest("GET", _JOBS, JobList, arguments={"params": params})


def job_pages(job_id: str, after: int, limit: int) -> OcrRequest[JobPages]:
    return OcrRequest(
        "GET", f"{_JOBS}/{job_id}/pages", JobPages, arguments={"params": {"after": after, "limit": limit}}
    )


def cancel(job_id: str) -> OcrRequest[OcrJob]:
    return OcrRequest("POST", f"{_JOBS}/{job_id}/cancel", OcrJob)


def delete(job_id: str) -> OcrRequest[Nothing]:
    return OcrRequest("DELETE", f"{_JOBS}/{job_id}", Nothing)


@dataclass(slots=True)
class Follower:
    """Iterates over the pages of a job."""

    after: int
    """`seq` of the last page so far."""
    has_more: bool = True
    """Whether further pages are available already."""

    def take(self, pages: JobPages) -> tuple[OcrPage, ...]:
        seen = max((page.seq for page in pages.data if page.seq is not None), default=self.after)
        self.has_more = pages.has_more and seen > self.after
        self.after = seen
        return pages.data


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Convert httpx's exceptions to ConnectionLostError."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise from_httpx(error) from error


def client_arguments(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Arguments of httpx's clients.

    Raises:
        ValueError: the address or the key cannot be used.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"the address {base_url!r} must begin with http:// or https://")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("the API key must consist of printable ASCII characters, without line breaks")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return {
        "base_url": base_url.rstrip("/").removesuffix("/v1"),
        "headers": headers,
        "timeout": httpx.Timeout(timeout_s, connect=_CONNECT_S),
        "trust_env": False,  # neither the key nor the document goes to a proxy from the environment
    }
