"""What the router must know of a request before it relays the body's bytes: checked once, here. Pure.

Everything else about a request is the engine's to judge; vLLM's own answer is then brought into OpenAI's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from serving.errors import InvalidRequestError, ModelNotFoundError
from serving.router.images import check_image_url
from serving.settings import RouterSettings, Settings

_CHOICE_COUNTS = ("n", "best_of")


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """A request that may be relayed."""

    path: str
    """The engine's path for it."""
    model: str
    """Canonical name."""
    body: bytes
    is_stream: bool
    wants_stream_usage: bool


def parse_request(path: str, body: bytes, settings: Settings) -> RoutedRequest:
    """Check a body that was received whole.

    Raises:
        RequestError: what is wrong with it.
    """
    payload = _decode(body)
    model = _find_model(payload.get("model"), settings)
    is_stream = _read_bool(payload, "stream")
    stream_options = payload.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise InvalidRequestError("stream_options must be an object.", param="stream_options")
    _check_choices(payload, settings.router)
    if path.endswith("/chat/completions"):
        _check_messages(payload.get("messages"), settings.router)
    return RoutedRequest(
        path=path,
        model=model,
        body=body,
        is_stream=is_stream,
        wants_stream_usage=bool(stream_options and stream_options.get("include_usage")),
    )


def _decode(body: bytes) -> dict[str, Any]:
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(payload, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    return payload


def _find_model(name: Any, settings: Settings) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidRequestError("You must name a model.", param="model")
    model = settings.find_model(name)
    if model is None:
        shown = name if len(name) <= 100 else name[:100] + "..."
        raise ModelNotFoundError(
            f"The model '{shown}' does not exist; GET /v1/models lists those that do.", param="model"
        )
    return model


def _read_bool(payload: dict[str, Any], key: str) -> bool:
    value = payload.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{key} must be true or false.", param=key)
    return value


def _check_choices(payload: dict[str, Any], router: RouterSettings) -> None:
    limit = router.limits.max_choices
    for key in _CHOICE_COUNTS:
        value = payload.get(key)
        if isinstance(value, int) and value > limit:
            raise InvalidRequestError(f"{key} may be {limit} at most.", param=key)


def _check_messages(messages: Any, router: RouterSettings) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message.", param="messages")
    if len(messages) > router.limits.max_messages:
        raise InvalidRequestError(f"messages may hold {router.limits.max_messages} at most.", param="messages")
    for num_images, (param, url) in enumerate(_image_urls(messages), start=1):
        if num_images > router.limits.max_images:
            raise InvalidRequestError(f"A request may hold {router.limits.max_images} images at most.", param=param)
        check_image_url(url, param, router)


def _image_urls(messages: list[Any]) -> Iterator[tuple[str, Any]]:
    """Every `image_url` part's place and URL. Parts of other types are left to the engine."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequestError("Every message must be an object.", param=f"messages[{i}]")
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for j, part in enumerate(content):
            param = f"messages[{i}].content[{j}]"
            if not isinstance(part, dict):
                raise InvalidRequestError("Every content part must be an object.", param=param)
            if part.get("type") == "image_url" or "image_url" in part:
                image = part.get("image_url")
                yield f"{param}.image_url", image.get("url") if isinstance(image, dict) else image
