"""What can go wrong between a client and the OCR service.

    OcrError
    ├── ConnectionLostError     no answer, or one that broke off
    ├── BadAnswerError          an answer that is not this API's
    └── RequestRefusedError     an error in OpenAI's shape; `status`, `code`, `param`
        ├── KeyRefusedError     401, 403: no valid key, or one that may not
        ├── NotFoundError       404: no such model or job
        ├── QuotaError          429 `insufficient_quota`: waiting does not help
        ├── BusyError           408, 409, 429, 503: later it may go
        └── ServiceError        other 5xx, and documents that failed midway

httpx's exceptions become one of these where they enter (`from_httpx`).
"""

from __future__ import annotations

from typing import Any

import httpx

from serving.ocr_api.shapes import ErrorDetail


class OcrError(Exception):
    """Base of the tree."""

    is_passing = False
    """Whether the same request may succeed later."""


class ConnectionLostError(OcrError):
    is_passing = True

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent
        """Whether the service may have got the request: then it may have been worked on, and paid for."""


class BadAnswerError(OcrError):
    """Something else answers at this address, or a service of another version."""


class RequestRefusedError(OcrError):
    def __init__(self, status: int, failure: ErrorDetail, retry_after_s: float | None = None) -> None:
        super().__init__(failure.message)
        self.status = status
        self.code = failure.code
        self.param = failure.param
        self.retry_after_s = retry_after_s
        """How long the service asks to wait, if it does."""


class KeyRefusedError(RequestRefusedError):
    pass


class NotFoundError(RequestRefusedError):
    pass


class QuotaError(RequestRefusedError):
    pass


class BusyError(RequestRefusedError):
    is_passing = True


class ServiceError(RequestRefusedError):
    is_passing = True


_KINDS: dict[int, type[RequestRefusedError]] = {401: KeyRefusedError, 403: KeyRefusedError, 404: NotFoundError}
_BUSY = frozenset({408, 409, 429, 503})


def from_answer(status: int, body: Any, retry_after_s: float | None = None) -> OcrError:
    """The error that an answer tells.

    Args:
        status: HTTP's, not 2xx; 200 for an error inside a stream.
        body: decoded JSON, None when it was not JSON.
        retry_after_s: that the answer asked for.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        message = f"The address answered {status}, and not as an OCR service does."
        # A proxy's own page while the service restarts.
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
    """No answer, in our own words."""
    was_sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    what = "The connection was lost" if was_sent else "The service could not be reached"
    if isinstance(error, httpx.TimeoutException) and was_sent:
        what = "The service has not answered in time"
    return ConnectionLostError(f"{what} ({type(error).__name__}).", was_sent=was_sent)
