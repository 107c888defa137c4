"""The exceptions of the OCR client.

    OcrError
    ├── ConnectionLostError     no answer, or it broke off
    ├── BadAnswerError          an answer that does not follow this API
    └── RequestRefusedError     an error in OpenAI's shape; `status`, `code`, `param`
        ├── KeyRefusedError     401, 403: no valid key, or it lacks a permission
        ├── NotFoundError       404: no such model or job
        ├── QuotaError          429 `insufficient_quota`: retrying does not help
        ├── BusyError           408, 409, 429, 503: a retry may succeed
        └── ServiceError        other 5xx, and streams that failed midway

httpx's exceptions are converted (`from_httpx`).
"""

from __future__ import annotations

from typing import Any

import httpx

from serving.ocr_api.shapes import ErrorDetail


class OcrError(Exception):
    """Base class of all errors."""

    is_transient = False
    """Whether the same request may succeed later."""


class ConnectionLostError(OcrError):
    is_transient = True

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent
        """Whether the service may have received the request, so that it may have been carried out and charged."""


class BadAnswerError(OcrError):
    """The address belongs to something else, or to a service of an incompatible version."""


class RequestRefusedError(OcrError):
    def __init__(self, status: int, failure: ErrorDetail, retry_after_s: float | None = None) -> None:
        super().__init__(failure.message)
        self.status = status
        self.code = failure.code
        self.param = failure.param
        self.retry_after_s = retry_after_s
        """How many seconds to wait before a retry, if the service said so."""


class KeyRefusedError(RequestRefusedError):
    pass


class NotFoundError(RequestRefusedError):
    pass


class QuotaError(RequestRefusedError):
    pass


class BusyError(RequestRefusedError):
    is_transient = True


class ServiceError(RequestRefusedError):
    is_transient = True


_KINDS: dict[int, type[RequestRefusedError]] = {401: KeyRefusedError, 403: KeyRefusedError, 404: NotFoundError}
_BUSY = frozenset({408, 409, 429, 503})


def from_answer(status: int, body: Any, retry_after_s: float | None = None) -> OcrError:
    """The error in an answer.

    Args:
        status: the HTTP status; 200 for an error within a stream.
        body: decoded JSON, None if it was not JSON.
        retry_after_s: from the answer's Retry-After, in seconds.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        message = f"The address answered with status {status}, but not as an OCR service; check the URL."
        # Probably a proxy's own page while the service restarts.
        return (
            ServiceError(status, ErrorDetail(message=message), retry_after_s)
            if status >= 500
            else BadAnswerError(message)
        )
    texts = {name: error[name] for name in ("type", "param", "code") if isinstance(error.get(name), str)}
    failure = ErrorDetail(message=error["message"], **texts)
    if failure.code == "insufficient_quota":
        return QuotaError(status, failure)
    if status in _BUSY:
        return BusyError(status, failure, retry_after_s)
    kind = _KINDS.get(status, ServiceError if status >= 500 or status == 200 else RequestRefusedError)
    return kind(status, failure, retry_after_s)


def from_httpx(error: httpx.HTTPError | httpx.StreamError) -> ConnectionLostError:
    """Convert an exception of httpx."""
    was_sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    what = "The connection was lost" if was_sent else "The service could not be reached"
    if isinstance(error, httpx.TimeoutException) and was_sent:
        what = "The service did not answer in time"
    return ConnectionLostError(f"{what} ({type(error).__name__}).", was_sent=was_sent)
