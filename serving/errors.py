"""Every error that the stack reports to a caller, with its status and message.

    ServingError
    ├── SettingsError               a settings file or environment that cannot be used (start-up only)
    ├── RequestError                the caller's request is wrong; never retried
    │   ├── InvalidRequestError     400
    │   │   ├── InvalidImageError   400
    │   │   │   └── BadBase64Error  400
    │   │   ├── ImageTooLargeError  400
    │   │   ├── ModeNotSupportedError 400
    │   │   └── RenderError         400 of a document or page; `code` says why
    │   ├── AuthenticationError     401
    │   ├── PermissionDeniedError   403
    │   ├── RouteNotFoundError      404
    │   ├── ModelNotFoundError      404
    │   ├── JobNotFoundError        404
    │   ├── MethodNotAllowedError   405
    │   ├── RequestTimeoutError     408 the client sends too slowly
    │   ├── BodyTooLargeError       413
    │   ├── UnsupportedCodingError  415
    │   ├── HeadersTooLargeError    431
    │   ├── RateLimitError          429 with Retry-After
    │   └── QuotaExceededError      429 the month's budget is spent
    ├── OverloadedError             503 with Retry-After: nothing was tried
    ├── EngineError                 4xx an engine's own refusal, made by `from_engine`; never retried
    └── UpstreamError               the stack failed; another replica may be tried
        ├── NoReplicaError          503
        ├── ReplicaUnreachableError 502
        │   └── ReplicaConnectError 502 it never got the request
        ├── ReplicaTimeoutError     504 never retried
        └── InternalError           500, or the engine's other 5xx; never retried

The body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`
(https://platform.openai.com/docs/guides/error-codes). One branch renders all of them; errors of other programs are
converted where they enter the stack (`from_engine`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class ServingError(Exception):
    """Base class; `message` is written for the caller and contains no secrets and no content."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    @property
    def http_status(self) -> int:
        return self.status

    @property
    def headers(self) -> dict[str, str]:
        """Headers of this error's response, in addition to those of every response."""
        return {}

    def body(self) -> dict[str, Any]:
        """Return the response body that OpenAI's clients expect."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class SettingsError(ServingError):
    """Invalid settings; the message names the file or variable, the key and the reason."""


class RequestError(ServingError):
    type = "invalid_request_error"


class InvalidRequestError(RequestError):
    status = 400


class InvalidImageError(InvalidRequestError):
    default_code = "invalid_image"


class BadBase64Error(InvalidImageError):
    """An image's data URL is not strict base64, as engines require it."""


class ImageTooLargeError(InvalidRequestError):
    default_code = "image_too_large"


class ModeNotSupportedError(InvalidRequestError):
    """A choice of the resolution mode for a model that reads pages in one."""

    default_code = "mode_not_supported"


class RenderError(InvalidRequestError):
    """A document or page that could not be rendered; `code` gives the reason."""

    default_code = "damaged_document"


class RouteNotFoundError(RequestError):
    status = 404
    default_code = "not_found"


class ModelNotFoundError(RequestError):
    status = 404
    default_code = "model_not_found"


class JobNotFoundError(RequestError):
    """There is no OCR job with this id, or it belongs to another tenant."""

    status = 404
    default_code = "job_not_found"


class MethodNotAllowedError(RequestError):
    status = 405
    default_code = "method_not_allowed"

    def __init__(self, message: str, allowed: str = "", *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"allow": self.allowed}  # RFC 9110, section 15.5.6


class AuthenticationError(RequestError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}  # RFC 9110, section 15.5.2


class PermissionDeniedError(RequestError):
    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class RequestTimeoutError(RequestError):
    status = 408
    type = "timeout_error"
    default_code = "request_timeout"


class RateLimitError(RequestError):
    """The tenant reached a limit of its own; other tenants are served."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(
        self, message: str, retry_after_s: float = 1.0, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return _retry_after(self.retry_after_s)


class QuotaExceededError(RequestError):
    status = 429
    type = "insufficient_quota"
    default_code = "insufficient_quota"


class OverloadedError(ServingError):
    """More work than the replicas can handle: the queue is full, or the deadline would pass while queueing."""

    status = 503
    type = "service_unavailable_error"
    default_code = "overloaded"

    def __init__(
        self, message: str, retry_after_s: float = 1.0, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return _retry_after(self.retry_after_s)


def _retry_after(seconds: float) -> dict[str, str]:
    """Return `Retry-After` in whole seconds (RFC 9110, section 10.2.3), and in milliseconds for OpenAI's clients."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}


class BodyTooLargeError(RequestError):
    status = 413
    default_code = "request_too_large"


class UnsupportedCodingError(RequestError):
    """The body has a content coding that cannot be decoded."""

    status = 415
    default_code = "unsupported_encoding"

    @property
    def headers(self) -> dict[str, str]:
        return {"accept-encoding": "gzip, deflate, zstd"}  # RFC 9110, section 15.5.16


class HeadersTooLargeError(RequestError):
    status = 431
    default_code = "headers_too_large"


class UpstreamError(ServingError):
    is_retryable = True


class NoReplicaError(UpstreamError):
    status = 503
    type = "service_unavailable_error"
    default_code = "no_replica"

    @property
    def headers(self) -> dict[str, str]:
        return _retry_after(1.0)


class ReplicaUnreachableError(UpstreamError):
    status = 502
    default_code = "replica_unreachable"


class ReplicaConnectError(ReplicaUnreachableError):
    """The connection could not be established, so the replica has not started on the request."""


class ReplicaTimeoutError(UpstreamError):
    status = 504
    type = "timeout_error"
    default_code = "replica_timeout"
    is_retryable = False  # it has already occupied a replica for a long time


class InternalError(UpstreamError):
    is_retryable = False
    default_code = "internal_error"

    def __init__(self, message: str, status: int = 500, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self._status = status

    @property
    def http_status(self) -> int:
        return self._status


class EngineError(ServingError):
    """An error response of the engine's OpenAI server, converted by `from_engine`."""

    def __init__(self, status: int, message: str, *, type: str, param: str | None, code: str | None) -> None:  # noqa: A002
        super().__init__(message, param=param, code=code)
        self._status = status
        self._type = type

    @property
    def http_status(self) -> int:
        return self._status

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}}


# OpenAI's `type` by status; vLLM names the exception class or the HTTP phrase there, and puts the status into `code`.
_TYPE_BY_STATUS = {403: "permission_error", 429: "rate_limit_error"}
_DEAD_WORDS = "EngineCore encountered an issue"
"""Part of the message of vLLM's API server when its engine process died: it answers 500 to all running requests."""
_CONTEXT_LENGTH_WORDS = ("maximum context length", "max_model_len", "longer than the maximum model length")


def from_engine(status: int, answer: Any) -> ServingError:
    """Convert an engine's error response (decoded JSON, or None if it was not JSON) into OpenAI's shape.

    422 becomes 400, the status that OpenAI uses for every malformed request. A 5xx keeps its status but not its
    message, which may reveal internals. A 503, and a request that ran on an engine that died, may succeed on another
    replica. A 401 is the stack's own fault: the engine rejected the router.
    """
    error = answer.get("error") if isinstance(answer, dict) else None
    detail = error if isinstance(error, dict) else {}
    if status == 503:
        return NoReplicaError("The model is overloaded or restarting; try again shortly.")
    if status == 401:
        return InternalError(
            "The router's key for the engine is not the engine's; the operator has to correct the settings."
        )
    if status >= 500 and _DEAD_WORDS in str(detail.get("message")):
        return ReplicaUnreachableError("The replica that ran this request was lost.")
    if status >= 500:
        return InternalError("The model failed on this request; it was not your request's format. Try again.", status)
    message = str(detail.get("message") or "The model refused this request.")
    param = detail.get("param")
    code = detail.get("code")
    if any(words in message for words in _CONTEXT_LENGTH_WORDS):
        code = "context_length_exceeded"
    return EngineError(
        400 if status == 422 else status,
        message,
        type=_TYPE_BY_STATUS.get(status, "invalid_request_error"),
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )
