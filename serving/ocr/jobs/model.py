"""A job's states, its submission and its database row. Pure. Amounts are nanodollars, times nanoseconds since 1970."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from serving.billing.credits import SERVICE_MARK
from serving.ocr.reading.pages import PageUsage
from serving.ocr.reading.results import build_usage
from serving.ocr_api.shapes import DocumentFacts, ErrorDetail, JobStatus, OcrJob

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = STATES = tuple(status.value for status in JobStatus)
OPEN = (QUEUED, RUNNING)
NS = 10**9


@dataclass(frozen=True, slots=True)
class NewJob:
    """A submission."""

    owner: str
    model: str
    options: dict[str, Any]
    document: DocumentFacts
    pages: Sequence[int]
    sealed_key: str
    digest: str
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as it is stored."""

    job_id: str
    owner: str
    status: str
    options: dict[str, Any]
    document: DocumentFacts
    pages: tuple[int, ...]
    sealed_key: str
    digest: str
    error: ErrorDetail | None
    num_done: int
    num_failed: int
    usage: PageUsage
    created_ns: int
    started_ns: int
    finished_ns: int
    expires_ns: int
    num_takes: int

    def build_job(self) -> OcrJob:
        """In the API's shape."""
        return OcrJob(
            id=self.job_id,
            status=JobStatus(self.status),
            created_at=self.created_ns // NS,
            started_at=self.started_ns // NS or None,
            finished_at=self.finished_ns // NS or None,
            expires_at=self.expires_ns // NS or None,
            model=self.options["model"],
            document=self.document,
            options={name: value for name, value in self.options.items() if name != "model"},
            pages_total=len(self.pages),
            pages_done=self.num_done,
            pages_failed=self.num_failed,
            usage=build_usage(self.usage, self.num_done, self.num_failed),
            error=self.error,
        )


def new_job_id() -> str:
    return f"job-{uuid.uuid4().hex}"


def find_page(job_id: str, request_id: str) -> int | None:
    """The index of the page that a request in the ledger was for.

    None when the request was for another job, or was not made by a service of this stack.
    """
    found = re.fullmatch(rf"{re.escape(SERVICE_MARK + job_id)}-p([0-9]{{1,9}})-t[0-9.a-f]+", request_id)
    return int(found[1]) - 1 if found is not None else None


def dump(value: Any) -> str:
    """JSON text for the tables."""
    return orjson.dumps(value).decode()


def read_job(row: Any) -> JobRow:
    """Parse a row of the database."""
    usage = PageUsage(row.prompt_tokens, row.completion_tokens, row.image_tokens, row.cost_nanodollars)
    return JobRow(
        job_id=row.job_id,
        owner=row.owner,
        status=row.status,
        options=orjson.loads(row.options),
        document=DocumentFacts.model_validate_json(row.document),
        pages=tuple(orjson.loads(row.pages)),
        sealed_key=row.sealed_key,
        digest=row.digest,
        error=ErrorDetail.model_validate_json(row.error) if row.error else None,
        num_done=row.num_done,
        num_failed=row.num_failed,
        usage=usage,
        created_ns=row.created_ns,
        started_ns=row.started_ns,
        finished_ns=row.finished_ns,
        expires_ns=row.expires_ns,
        num_takes=row.num_takes,
    )
