"""Builds requests and parses answers. No I/O, except that the document is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pydantic
import tenacity

from serving.http.retry_after import read_retry_after
from serving.ocr_api.shapes import StreamEvent, read_event
from serving.ocr_client.errors import BadAnswerError, ConnectionLostError, OcrError, RequestRefusedError, from_answer
from serving.ocr_client.file_names import wire_name

Answer = TypeVar("Answer", bound=pydantic.BaseModel)

_DATA, _DONE = "data:", "[DONE]"


@dataclass(frozen=True, slots=True)
class Document:
    """Bytes with a name, for documents that are not in a file."""

    data: bytes
    name: str = "document"


Source = Path | Document | str
"""A file, bytes, or an `https:` or `data:` URL. The service must allow the URL's host."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long requests are retried that were refused temporarily or did not reach the service."""

    max_wait_s: float = 60.0
    """Seconds from the first attempt to the start of the last one; 0 for a single attempt."""
    first_pause_s: float = 0.25
    max_pause_s: float = 8.0
    """Limit on the client's own pauses; a wait that the service asks for (`Retry-After`) is always respected."""
    on_wait: Callable[[OcrError, float], None] | None = None
    """Called before each pause, with the error and the seconds that have passed since the first attempt."""


def build_document(source: Source, fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an httpx request with a document: files and bytes as a form, URLs as JSON.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, str):
        return {"json": {**fields, "document": {"type": "document_url", "document_url": source}}}
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in fields.items()}
    content: Any = source.open("rb") if isinstance(source, Path) else source.data
    return {"data": texts, "files": {"file": (wire_name(source.name), content)}}


def close_document(arguments: dict[str, Any]) -> None:
    """Close the file that `build_document` opened, if it did."""
    for _, content in arguments.get("files", {}).values():
        if not isinstance(content, bytes):
            content.close()


def build_retrying(policy: RetryPolicy, *, is_repeatable: bool) -> dict[str, Any]:
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`.

    Args:
        policy: how long to retry.
        is_repeatable: whether sending the request twice is harmless. Otherwise it is only retried if the service
            refused it or was not reached.
    """
    own = tenacity.wait_exponential_jitter(
        multiplier=policy.first_pause_s, max=policy.max_pause_s, jitter=policy.first_pause_s
    )

    def pause_s(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked_s = error.retry_after_s if isinstance(error, RequestRefusedError) else None
        # Random, so that clients that were refused together do not all retry together.
        return own(state) if asked_s is None else asked_s + min(own(state), 1.0)

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if policy.on_wait is not None and isinstance(error, OcrError):
            policy.on_wait(error, state.seconds_since_start or 0.0)

    return {
        "before_sleep": tell,
        "retry": tenacity.retry_if_exception(lambda error: _can_repeat(error, is_repeatable=is_repeatable)),
        "wait": pause_s,
        "stop": tenacity.stop_before_delay(policy.max_wait_s),
        "reraise": True,
    }


def _can_repeat(error: BaseException, *, is_repeatable: bool) -> bool:
    if not isinstance(error, OcrError) or not error.is_transient:
        return False
    if isinstance(error, ConnectionLostError):
        return is_repeatable or not error.was_sent
    return is_repeatable or (isinstance(error, RequestRefusedError) and error.status in (429, 502, 503))


def check_answer(answer: httpx.Response) -> None:
    """Check the status of an answer whose body has been read.

    Raises:
        OcrError: the answer is an error.
    """
    if not answer.is_success:
        raise from_answer(answer.status_code, _decode(answer), read_retry_after(answer.headers))


def read_answer(answer: httpx.Response, kind: type[Answer]) -> Answer:
    """Parse the body of an answer.

    Raises:
        OcrError: the answer is an error, or does not follow this API.
    """
    check_answer(answer)
    try:
        return kind.model_validate(_decode(answer))
    except pydantic.ValidationError as error:
        raise BadAnswerError(
            f"The answer does not follow the OCR API ({error.error_count()} invalid fields)."
        ) from error


def _decode(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


class EventReader:
    """Parses the lines of a stream into events."""

    def __init__(self) -> None:
        self.is_done = False

    def take(self, line: str) -> StreamEvent | None:
        """The event in a line, if there is one.

        Raises:
            OcrError: the document failed midway, or the line does not follow this API.
        """
        if not line.startswith(_DATA):
            return None
        data = line[len(_DATA) :].strip()
        if data == _DONE:
            self.is_done = True
            return None
        try:
            frame = json.loads(data)
            if "error" in frame:
                raise from_answer(200, frame)
            return read_event(frame)
        except (ValueError, TypeError, AttributeError) as error:
            raise BadAnswerError("The stream does not follow the OCR API.") from error

    def finish(self) -> None:
        """Check that the stream was complete.

        Raises:
            ConnectionLostError: it ended early.
        """
        if not self.is_done:
            raise ConnectionLostError("The stream broke off.", was_sent=True)
