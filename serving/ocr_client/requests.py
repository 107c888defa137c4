"""What can be asked of the OCR service, each as a value that either client sends; pure but for opening documents."""

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
    """The answer to what has none."""


@dataclass(frozen=True, slots=True)
class OcrRequest(Generic[Answer]):
    """One request, and what its answer is read as."""

    method: str
    path: str
    kind: type[Answer]
    document: tuple[Source, dict[str, Any]] | None = None
    """With the fields that say how it is to be read."""
    is_repeatable: bool = True
    """Whether it may be sent again though it may have been worked on."""
    is_stream: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of httpx's."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[dict[str, Any]]:
        """Arguments of `httpx.Client.build_request`, while the document is open. httpx's errors become ours.

        Raises:
            OSError: the document cannot be read.
            ConnectionLostError: there was no answer.
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
    """With a key of its own when none is given, so that it may be sent again."""
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
    """How far the pages of a job have been seen."""

    after: int
    """`seq` of the last one."""
    has_more: bool = True
    """Whether the next ones can be had at once."""

    def take(self, pages: JobPages) -> tuple[OcrPage, ...]:
        seen = max((page.seq for page in pages.data if page.seq is not None), default=self.after)
        self.has_more = pages.has_more and seen > self.after
        self.after = seen
        return pages.data


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raises ConnectionLostError for what httpx raises."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise from_httpx(error) from error


def client_arguments(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Of httpx's clients."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return {
        "base_url": base_url.rstrip("/"),
        "headers": headers,
        "timeout": httpx.Timeout(timeout_s, connect=_CONNECT_S),
        "trust_env": False,  # a proxy in the environment gets neither the key nor the document
    }
