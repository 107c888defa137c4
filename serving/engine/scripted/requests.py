"""Reads from a request how long its prompt is and how long its answer should be. Pure.

Tokens are estimated in a reproducible way: four bytes of text are one token, and an image has the tokens of its
resolution mode at its real size, as in the published model.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import pybase64
from PIL import Image

from serving.plugin.images.geometry import shown_size
from serving.plugin.modes.selection import ModeRules, ModeSelectionError
from serving.settings.stack import ScriptSettings

_BYTES_PER_TOKEN = 4
_HEAD_CHARS = 64 * 1024  # a multiple of four, so that the prefix is valid base64
_PAGE = (1654, 2339)  # A4 at 200 dpi, assumed for an image whose size cannot be read
_RULES = ModeRules.from_config({})


class ScriptedRefusalError(Exception):
    """A request that vLLM would refuse as well, with vLLM's `type` and `status`."""

    def __init__(self, message: str, *, status: int = 400, type: str = "BadRequestError", param: str | None = None):  # noqa: A002
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param


@dataclass(frozen=True, slots=True)
class ScriptedRequest:
    """One request with its token counts."""

    model: str
    is_chat: bool
    is_stream: bool
    include_usage: bool | None
    """`stream_options.include_usage`, None if absent."""
    continuous_usage: bool
    num_choices: int
    prompt_tokens: int
    """Tokens of all prompts together, including image tokens."""
    image_tokens: int
    output_tokens: int
    """Tokens of each choice."""
    finish_reason: str
    """`stop` if the answer ends by itself, `length` if the request's or the model's limit ends it."""


def read_request(path: str, body: bytes, script: ScriptSettings, names: tuple[str, ...]) -> ScriptedRequest:
    """Check a body and count its tokens.

    Raises:
        ScriptedRefusalError: vLLM would refuse the body; the message is vLLM's where clients depend on it.
    """
    payload = _decode(body)
    model = payload.get("model") or names[0]
    if model not in names:
        raise ScriptedRefusalError(
            f"The model `{model}` does not exist.", status=404, type="NotFoundError", param="model"
        )
    is_chat = path.endswith("/chat/completions")
    if is_chat and not isinstance(payload.get("messages"), list):
        raise ScriptedRefusalError("messages: Field required", param="messages")
    num_prompts, prompt_tokens = (1, _count_messages(payload["messages"])) if is_chat else _count_prompts(payload)
    image_tokens = _count_images(payload) if is_chat else 0
    prompt_tokens += image_tokens
    output_tokens, finish_reason = _plan_output(payload, prompt_tokens // num_prompts, script)
    options = payload.get("stream_options")
    options = options if isinstance(options, Mapping) else {}
    return ScriptedRequest(
        model=model,
        is_chat=is_chat,
        is_stream=payload.get("stream") is True,
        include_usage=options.get("include_usage"),
        continuous_usage=options.get("include_usage") is True and options.get("continuous_usage_stats") is True,
        num_choices=num_prompts * (_read_count(payload, "n") or 1),
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens,
        output_tokens=output_tokens,
        finish_reason=finish_reason,
    )


def _decode(body: bytes) -> dict[str, Any]:
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ScriptedRefusalError(f"JSON decode error: {error}") from error
    if not isinstance(payload, dict):
        raise ScriptedRefusalError("Input should be a valid dictionary")
    return payload


def _read_count(payload: Mapping[str, Any], key: str) -> int | None:
    value = payload.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise ScriptedRefusalError(f"{key} must be at least 1, got {value}.", param=key)
    return value


def _plan_output(payload: Mapping[str, Any], prompt_tokens: int, script: ScriptSettings) -> tuple[int, str]:
    """Return the number of tokens of the answer and its finish reason."""
    room = script.max_model_len - prompt_tokens
    if room < 1:
        raise ScriptedRefusalError(
            f"This model's maximum context length is {script.max_model_len} tokens. However, your request has "
            f"{prompt_tokens} input tokens. Please reduce the length of the input messages."
        )
    asked = _read_count(payload, "max_completion_tokens") or _read_count(payload, "max_tokens")
    most = min(room, asked or room)
    own_end = max(script.output_tokens, payload.get("min_tokens") or 0)
    if payload.get("ignore_eos") is True or own_end > most:
        return most, "length"
    return own_end, "stop"


def _count_text(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)


def _count_messages(messages: list[Any]) -> int:
    """Estimate a text's tokens; at least one, for the token that every prompt begins with."""
    texts = (part.get("text") for part in _content_parts(messages))
    return 1 + sum(_count_text(text) for text in texts if isinstance(text, str))


def _content_parts(messages: list[Any]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            yield {"text": content}
        elif isinstance(content, list):
            yield from (part for part in content if isinstance(part, Mapping))


def _count_prompts(payload: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of prompts and their tokens, for a text, a list of texts, token ids, or a list of such
    lists."""
    prompt = payload.get("prompt")
    if isinstance(prompt, str):
        return 1, 1 + _count_text(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise ScriptedRefusalError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if isinstance(prompt[0], int):
        return 1, len(prompt)
    return len(prompt), sum(1 + _count_text(part) if isinstance(part, str) else len(part) for part in prompt)


def _count_images(payload: Mapping[str, Any]) -> int:
    urls = [_read_url(part["image_url"]) for part in _content_parts(payload["messages"]) if part.get("image_url")]
    if not urls:
        return 0
    sizes = [_read_size(url) for url in urls]
    options = payload.get("mm_processor_kwargs")
    try:
        chosen = _RULES.choose(options if isinstance(options, Mapping) else {}, {}, sizes)
    except ModeSelectionError as error:
        raise ScriptedRefusalError(str(error), param="mm_processor_kwargs") from error
    return sum(choice.mode.num_tokens(*size) for choice, size in zip(chosen, sizes, strict=True))


def _read_url(image: Any) -> str:
    url = image.get("url") if isinstance(image, Mapping) else image
    return url if isinstance(url, str) else ""


def _read_size(url: str) -> tuple[int, int]:
    """Read an image's size from its header. An unreadable image is treated as a page; checking it is not the
    purpose."""
    encoded = url.partition(",")[2]
    for text in (encoded[:_HEAD_CHARS], encoded):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(pybase64.b64decode(text))) as image:
                    return shown_size(image)
        except (OSError, ValueError, SyntaxError, TypeError, KeyError, Image.DecompressionBombError):
            continue
    return _PAGE
