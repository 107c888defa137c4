"""Requests of the OCR service's clients, and the reading of its answers, without any I/O but opening the document."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pydantic
import tenacity

from serving.http.retry_after import read_retry_after
from serving.ocr_api.shapes import StreamEvent, read_event
from serving.ocr_client.errors import BadAnswerError, ConnectionLostError, OcrError, RequestRefusedError, from_answer
from serving.ocr_client.file_names import show_name

Answer = TypeVar("Answer", bound=pydantic.BaseModel)

_DATA, _DONE = "data:", "[DONE]"


@dataclass(frozen=True, slots=True)
class Document:
    """Bytes with a name, for what is not in a file."""

    data: bytes
    name: str = "document"


Source = Path | Document | str
"""A file, bytes, or an `https:` or `data:` address (the service must allow the host)."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a request is sent again: refused for now, or the service could not be reached."""

    max_wait_s: float = 60.0
    """From the first try until the last one begins; 0 tries once."""
    first_pause_s: float = 0.25
    max_pause_s: float = 8.0
    """Of the client's own choosing; what the service asks for (`Retry-After`) is always waited."""


def build_document(source: Source, fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an httpx request that carries a document: a file as it is, an address as JSON.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, str):
        return {"json": {**fields, "document": {"type": "document_url", "document_url": source}}}
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in fields.items()}
    content: Any = source.open("rb") if isinstance(source, Path) else source.data
    return {"data": texts, "files": {"file": (show_name(source.name), content)}}


def close_document(arguments: dict[str, Any]) -> None:
    """Close the file that `build_document` opened, if it did."""
    for _, content in arguments.get("files", {}).values():
        if not isinstance(content, bytes):
            content.close()


def build_retrying(policy: RetryPolicy, *, is_repeatable: bool) -> dict[str, Any]:
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`.

    Args:
        policy: how long.
        is_repeatable: whether sending twice does no harm. What is not is only sent again when the service has said
            that it did nothing, or was never reached.
    """
    own = tenacity.wait_exponential_jitter(
        multiplier=policy.first_pause_s, max=policy.max_pause_s, jitter=policy.first_pause_s
    )

    def pause_s(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked_s = error.retry_after_s if isinstance(error, RequestRefusedError) else None
        # Whoever was refused together shall not come back together.
        return own(state) if asked_s is None else asked_s + min(own(state), 1.0)

    return {
        "retry": tenacity.retry_if_exception(lambda error: _can_repeat(error, is_repeatable=is_repeatable)),
        "wait": pause_s,
        "stop": tenacity.stop_before_delay(policy.max_wait_s),
        "reraise": True,
    }


def _can_repeat(error: BaseException, *, is_repeatable: bool) -> bool:
    if not isinstance(error, OcrError) or not error.is_passing:
        return False
    if isinstance(error, ConnectionLostError):
        return is_repeatable or not error.was_sent
    return is_repeatable or (isinstance(error, RequestRefusedError) and error.status in (429, 502, 503))


def check_answer(answer: httpx.Response) -> None:
    """Raises:
    OcrError: what it says, when it is not a success. Its body must have been read.
    """
    if not answer.is_success:
        raise from_answer(answer.status_code, _decode(answer), read_retry_after(answer.headers))


def read_answer(answer: httpx.Response, kind: type[Answer]) -> Answer:
    """Raises:
    OcrError: what it says, or that it is not of this API.
    """
    check_answer(answer)
    try:
        return kind.model_validate(_decode(answer))
    except pydantic.ValidationError as error:
        raise BadAnswerError(f"The answer is not an OCR service's ({error.error_count()} fields are wrong).") from error


def _decode(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


class EventReader:
    """Lines of a stream to events."""

    def __init__(self) -> None:
        self.is_done = False

    def take(self, line: str) -> StreamEvent | None:
        """The event in a line, if there is one.

        Raises:
            OcrError: the document has failed midway, or the line is not of this API.
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
            raise BadAnswerError("The stream is not an OCR service's.") from error

    def finish(self) -> None:
        """Raises:
        ConnectionLostError: the stream has ended before its end.
        """
        if not self.is_done:
            raise ConnectionLostError("The stream broke off.", was_sent=True)
