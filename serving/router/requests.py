"""What the router must know of a request before it relays the body's bytes: checked once, here. Pure.

Everything else about a request is the engine's to judge; vLLM's own answer is then brought into OpenAI's shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from serving.directory import ReplicaRecord
from serving.errors import InvalidRequestError, ModelNotFoundError
from serving.plugin.selection import DEFAULT, MODE_FOR_DETAIL, ModeRules, SelectionError
from serving.router.images import check_image_url
from serving.router_settings import RouterSettings
from serving.settings import Settings

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
    image_sizes: tuple[tuple[int, int] | None, ...] = ()
    """Width and height of every image in its order, None where only the engine will know."""
    image_options: Mapping[str, Any] = field(default_factory=dict)
    """The `mm_processor_kwargs` that the engine gets."""
    num_text_chars: int = 0
    """Characters of the prompt's text: what there is to guess its tokens by."""
    max_tokens: int | None = None
    """Longest answer that the request allows, per choice."""
    num_choices: int = 1


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
    images: list[_Image] = []
    if path.endswith("/chat/completions"):
        images = _check_messages(payload.get("messages"), settings.router)
    options = _read_image_options(payload)
    details = [image.detail for image in images]
    if any(details) and "mode" not in options:
        # The engine knows nothing of `detail`; only then is the body written anew.
        options = {**options, "mode": [MODE_FOR_DETAIL.get(detail or "", DEFAULT) for detail in details]}
        body = orjson.dumps({**payload, "mm_processor_kwargs": options})
    return RoutedRequest(
        path=path,
        model=model,
        body=body,
        image_sizes=tuple(image.size for image in images),
        image_options=options,
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
    """Numbers in other clothes (1e6, "1000000") are refused too, since the engine would read them."""
    limit = router.limits.max_choices
    for key in _CHOICE_COUNTS:
        value = payload.get(key)
        if value is not None and (type(value) is not int or value > limit):
            raise InvalidRequestError(f"{key} must be a whole number of at most {limit}.", param=key)
    prompts = payload.get("prompt")
    if isinstance(prompts, list) and len(prompts) > limit and not isinstance(prompts[0], int):
        raise InvalidRequestError(f"prompt may hold {limit} prompts at most.", param="prompt")


@dataclass(frozen=True, slots=True)
class _Image:
    size: tuple[int, int] | None
    detail: str | None


def _check_messages(messages: Any, router: RouterSettings) -> list[_Image]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message.", param="messages")
    if len(messages) > router.limits.max_messages:
        raise InvalidRequestError(f"messages may hold {router.limits.max_messages} at most.", param="messages")
    images: list[_Image] = []
    for param, part in _image_parts(messages):
        if len(images) == router.limits.max_images:
            raise InvalidRequestError(f"A request may hold {router.limits.max_images} images at most.", param=param)
        url, detail = (part.get("url"), part.get("detail")) if isinstance(part, dict) else (part, None)
        if detail is not None and (not isinstance(detail, str) or detail not in MODE_FOR_DETAIL):
            known = ", ".join(MODE_FOR_DETAIL)
            raise InvalidRequestError(f"detail must be one of {known}.", param=f"{param}.detail")
        images.append(_Image(check_image_url(url, param, router), detail))
    return images


def _image_parts(messages: list[Any]) -> Iterator[tuple[str, Any]]:
    """Every image part's place and its `image_url`. Parts of other types are left to the engine."""
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
                yield f"{param}.image_url", part.get("image_url")


def _read_image_options(payload: dict[str, Any]) -> dict[str, Any]:
    options = payload.get("mm_processor_kwargs")
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InvalidRequestError("mm_processor_kwargs must be an object.", param="mm_processor_kwargs")
    return options


def resolve_modes(request: RoutedRequest, replica: ReplicaRecord) -> tuple[str, ...]:
    """The resolution mode in which a replica reads every image of a request; empty where only it can know."""
    sizes = [size for size in request.image_sizes if size is not None]
    if len(sizes) != len(request.image_sizes) or not replica.image_config:
        return ()
    try:
        chosen = _rules(replica.image_config).choose(request.image_options, dict(replica.image_options), sizes)
    except SelectionError:
        return ()  # the engine refuses it with its own words
    return tuple(choice.name for choice in chosen)


@lru_cache(maxsize=64)
def _rules(image_config: tuple[tuple[str, Any], ...]) -> ModeRules:
    return ModeRules.from_config(dict(image_config))
