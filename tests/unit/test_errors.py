from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serving import errors
from serving.errors import EngineError, InternalError, NoReplicaError, ServingError, from_engine

# class: HTTP status, OpenAI's type, default code, whether another replica may be tried
TREE: dict[type[ServingError], tuple[int, str, str | None, bool]] = {
    errors.SettingsError: (500, "server_error", None, False),
    errors.RequestError: (500, "invalid_request_error", None, False),
    errors.InvalidRequestError: (400, "invalid_request_error", None, False),
    errors.InvalidImageError: (400, "invalid_request_error", "invalid_image", False),
    errors.BadBase64Error: (400, "invalid_request_error", "invalid_image", False),
    errors.RenderError: (400, "invalid_request_error", "damaged_document", False),
    errors.ImageTooLargeError: (400, "invalid_request_error", "image_too_large", False),
    errors.ModeNotSupportedError: (400, "invalid_request_error", "mode_not_supported", False),
    errors.AuthenticationError: (401, "authentication_error", "invalid_api_key", False),
    errors.PermissionDeniedError: (403, "permission_error", "permission_denied", False),
    errors.RequestTimeoutError: (408, "timeout_error", "request_timeout", False),
    errors.RateLimitError: (429, "rate_limit_error", "rate_limit_exceeded", False),
    errors.QuotaExceededError: (429, "insufficient_quota", "insufficient_quota", False),
    errors.OverloadedError: (503, "service_unavailable_error", "overloaded", False),
    errors.RouteNotFoundError: (404, "invalid_request_error", "not_found", False),
    errors.ModelNotFoundError: (404, "invalid_request_error", "model_not_found", False),
    errors.JobNotFoundError: (404, "invalid_request_error", "job_not_found", False),
    errors.MethodNotAllowedError: (405, "invalid_request_error", "method_not_allowed", False),
    errors.BodyTooLargeError: (413, "invalid_request_error", "request_too_large", False),
    errors.UnsupportedCodingError: (415, "invalid_request_error", "unsupported_encoding", False),
    errors.HeadersTooLargeError: (431, "invalid_request_error", "headers_too_large", False),
    errors.UpstreamError: (500, "server_error", None, True),
    errors.NoReplicaError: (503, "service_unavailable_error", "no_replica", True),
    errors.ReplicaUnreachableError: (502, "server_error", "replica_unreachable", True),
    errors.ReplicaConnectError: (502, "server_error", "replica_unreachable", True),
    errors.ReplicaTimeoutError: (504, "timeout_error", "replica_timeout", False),
    errors.InternalError: (500, "server_error", "internal_error", False),
}


def descendants(base: type[ServingError]) -> Iterator[type[ServingError]]:
    for child in base.__subclasses__():
        yield child
        yield from descendants(child)


def test_the_table_holds_the_whole_tree() -> None:
    assert set(descendants(ServingError)) == {*TREE, EngineError}


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_is_shown_as_openai_shows_it(kind: type[ServingError]) -> None:
    status, type_, code, is_retryable = TREE[kind]
    error = kind("what went wrong", param="messages")
    assert error.http_status == status
    assert error.is_retryable is is_retryable
    assert error.body() == {
        "error": {"message": "what went wrong", "type": type_, "param": "messages", "code": code},
    }
    assert str(error) == "what went wrong"


@pytest.mark.parametrize(("wait_s", "shown"), [(0.0, ("1", "1")), (0.25, ("1", "250")), (61.5, ("62", "61500"))])
def test_who_is_refused_for_now_learns_when_to_come_back(wait_s: float, shown: tuple[str, str]) -> None:
    for kind in (errors.RateLimitError, errors.OverloadedError):
        assert kind("later", wait_s).headers == {"retry-after": shown[0], "retry-after-ms": shown[1]}


def test_a_code_that_is_given_goes_before_the_default() -> None:
    assert errors.ModelNotFoundError("gone", code="model_retired").body()["error"]["code"] == "model_retired"


def engine_answer(message: str = "temperature must be non-negative", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400, **more}}


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        pytest.param(
            400,
            engine_answer(param="temperature"),
            (400, "temperature must be non-negative", "invalid_request_error", "temperature", None),
            id="vLLM's class name and numeric code are not OpenAI's",
        ),
        pytest.param(
            422,
            engine_answer("wrong type"),
            (400, "wrong type", "invalid_request_error", None, None),
            id="unprocessable is a bad request",
        ),
        pytest.param(
            400,
            engine_answer(code="invalid_temperature"),
            (400, "temperature must be non-negative", "invalid_request_error", None, "invalid_temperature"),
            id="a code in words stays",
        ),
        pytest.param(
            404, engine_answer("no such model"), (404, "no such model", "invalid_request_error", None, None), id="404"
        ),
        pytest.param(429, engine_answer("slow"), (429, "slow", "rate_limit_error", None, None), id="429"),
        pytest.param(403, engine_answer("no"), (403, "no", "permission_error", None, None), id="403"),
        pytest.param(
            403,
            {"error": "Forbidden"},
            (403, "The model refused this request.", "permission_error", None, None),
            id="error is a string",
        ),
        pytest.param(
            400, None, (400, "The model refused this request.", "invalid_request_error", None, None), id="not JSON"
        ),
        pytest.param(
            400, [1], (400, "The model refused this request.", "invalid_request_error", None, None), id="a list"
        ),
        pytest.param(
            400,
            {"error": {"message": None, "param": 3}},
            (400, "The model refused this request.", "invalid_request_error", None, None),
            id="fields of other types",
        ),
    ],
)
def test_a_refusal_of_the_engine_is_brought_into_openai_shape(
    status: int, answer: Any, expected: tuple[int, str, str, str | None, str | None]
) -> None:
    error = from_engine(status, answer)
    shown = error.body()["error"]
    assert (error.http_status, *shown.values()) == expected
    assert list(shown) == ["message", "type", "param", "code"]
    assert not error.is_retryable


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, you requested 4000 tokens.",
        "The prompt (length 3000) exceeds it. Make sure that `max_model_len` is no smaller than the prompt.",
        "The decoder prompt (length 9) is longer than the maximum model length of 8.",
    ],
)
def test_a_prompt_over_the_context_has_openai_code(message: str) -> None:
    error = from_engine(400, engine_answer(message))
    assert error.body()["error"]["code"] == "context_length_exceeded"
    assert error.http_status == 400


@pytest.mark.parametrize("answer", [engine_answer("CUDA error at /opt/secret.py"), None, {"error": "secret"}])
@pytest.mark.parametrize("status", [500, 501, 502, 503, 504])
def test_a_failure_of_the_engine_keeps_its_message_inside(status: int, answer: Any) -> None:
    error = from_engine(status, answer)
    assert error.http_status >= 500
    assert "secret" not in str(error.body())


def test_an_engine_that_does_not_let_the_router_in_is_not_the_clients_fault() -> None:
    error = from_engine(401, {"error": "Unauthorized"})
    assert isinstance(error, InternalError)
    assert error.http_status == 500


def test_a_restarting_engine_lets_another_replica_be_tried() -> None:
    error = from_engine(503, None)
    assert isinstance(error, NoReplicaError)
    assert error.http_status == 503
    assert error.is_retryable


def test_a_request_that_failed_inside_an_engine_is_not_tried_again() -> None:
    error = from_engine(500, engine_answer())
    assert isinstance(error, InternalError)
    assert error.http_status == 500
    assert not error.is_retryable


@pytest.mark.parametrize("status", [501, 502, 504])
def test_a_failure_of_the_engine_keeps_its_status(status: int) -> None:
    assert from_engine(status, engine_answer()).http_status == status


def test_what_ran_on_an_engine_that_died_may_be_tried_on_another() -> None:
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    error = from_engine(500, {"error": {"message": message, "type": "InternalServerError", "code": 500}})
    assert isinstance(error, errors.ReplicaUnreachableError)
    assert error.is_retryable
    assert "stack trace" not in error.message
