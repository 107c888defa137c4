"""Parses and checks a request's body, once, before its bytes are relayed. Pure.

`fields` checks single fields. What depends on the model (context length, vocabulary, an image's pixels) is left to the
engine; vLLM's own error is then converted to OpenAI's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from serving.errors import InternalError, InvalidRequestError, ModelNotFoundError, ServingError
from serving.http.bodies import decode_json
from serving.plugin.modes.selection import DEFAULT, MODE_FOR_DETAIL
from serving.router.request.fields import CHAT_FIELDS, TEXT_FIELDS, check_fields, check_function, refuse
from serving.router.request.image_headers import check_image_url
from serving.settings.router import RouterSettings
from serving.settings.stack import Settings

_CHOICE_COUNTS = ("n", "best_of")
_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's and vLLM's default for completions; a chat's default is the rest of the context."""
_CHARS_PER_TOKEN_ID = 3
"""How many characters a token id in a prompt counts for."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_OTHER_MEDIA = frozenset({"uuid", "image_pil", "image_embeds", "input_image"}) | {
    "audio_url",
    "audio_embeds",
    "input_audio",
    "video_url",
    "video_embeds",
    "prompt_embeds",
    "file",
    "thinking",
    "tool_reference",
}


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """A request that has been checked and may be relayed."""

    path: str
    """The engine's path for it."""
    model: str
    """Canonical name."""
    body: bytes
    is_stream: bool
    wants_stream_usage: bool
    """Whether the client asked for a usage chunk at the end of a stream."""
    image_sizes: tuple[tuple[int, int] | None, ...] = ()
    """Width and height of every image in order; None if only the engine will know."""
    image_options: Mapping[str, Any] = field(default_factory=dict)
    """The `mm_processor_kwargs` that the engine gets."""
    num_text_chars: int = 0
    """Characters of the prompt's text, for estimating its tokens."""
    num_tool_bytes: int = 0
    """JSON size of what a chat template may write into the prompt besides the messages' text: tools, calls and
    names."""
    max_tokens: int | None = None
    """Longest answer that the request allows, per choice, in tokens."""
    max_tokens_field: str | None = None
    """The field in which the client set it; None if it did not."""
    num_choices: int = 1
    """Number of answers, of all prompts together."""
    num_prompts: int = 1
    num_messages: int = 1
    is_constrained: bool = False
    """Whether the answer has to match a grammar given by the client."""

    usage_in_last_chunk: bool = False
    """Whether a stream's usage belongs in the last chunk of its answer."""

    def with_max_tokens(self, num_tokens: int) -> RoutedRequest:
        """The same request with a bound on its answer that the client has not set."""
        return replace(self, body=add_field(self.body, "max_tokens", num_tokens), max_tokens=num_tokens)


def parse_request(path: str, body: bytes, settings: Settings) -> RoutedRequest:
    """Parse and check a complete body.

    Raises:
        RequestError: what is wrong with it.
    """
    payload = decode_json(body, settings.router.limits)
    model = _find_model(payload.get("model"), settings)
    is_chat = path.endswith("/chat/completions")
    num_choices = _count_choices(payload, settings.router.limits.max_choices)
    check_fields(payload, CHAT_FIELDS if is_chat else TEXT_FIELDS)
    if is_chat:
        content = _check_messages(payload.get("messages"), settings.router)
    else:
        content = _check_prompt(payload)
        num_choices *= content.num_prompts
        if num_choices > settings.router.limits.max_choices:
            raise refuse("prompt", f"at most {settings.router.limits.max_choices} prompts times n")
    stream_options = payload.get("stream_options")
    options = payload.get("mm_processor_kwargs") or {}
    if any(content.details) and "mode" not in options:
        # The engine does not know `detail`; the body is encoded again only in this case.
        options = {**options, "mode": [MODE_FOR_DETAIL.get(detail or "", DEFAULT) for detail in content.details]}
        body = orjson.dumps({**payload, "mm_processor_kwargs": options})
    if content.sizes and _keeps_special_tokens(payload):
        body = add_field(body, "skip_special_tokens", False)
    return RoutedRequest(
        path=path,
        model=model,
        body=body,
        image_sizes=tuple(content.sizes),
        image_options=options,
        is_stream=bool(payload.get("stream")),
        wants_stream_usage=bool(stream_options and stream_options.get("include_usage")),
        num_text_chars=content.num_chars,
        num_tool_bytes=_count_tool_bytes(payload),
        max_tokens=_read_max_tokens(payload, is_chat),
        max_tokens_field=_find_max_tokens(payload, is_chat),
        num_choices=num_choices,
        num_prompts=content.num_prompts,
        num_messages=len(payload["messages"]) if is_chat else 1,
        is_constrained=_is_constrained(payload),
    )


def _keeps_special_tokens(payload: Mapping[str, Any]) -> bool:
    """Whether to keep special tokens in the text of a page, as the published recipe does, unless the client says
    otherwise: in some tokenizers a table's cell tags are special tokens, and `<td>12</td><td>345</td>` would become
    `12345`. The token that ends an answer is omitted either way, unless the answer is to continue after it."""
    return payload.get("skip_special_tokens") is None and not payload.get("ignore_eos")


def _is_constrained(payload: dict[str, Any]) -> bool:
    form = payload.get("response_format")
    has_form = form is not None and form["type"] != "text"
    has_calls = payload.get("tool_choice") not in (None, "none", "auto")
    return has_form or has_calls or payload.get("structured_outputs") is not None


def blame(request: RoutedRequest, error: ServingError) -> ServingError:
    """Attribute an engine's error to the client or the engine: vLLM answers 500 if no text can match a request's
    grammar (`[^\\s\\S]`), which cannot be known beforehand. If that counted against the replica, a client could disable
    it."""
    if request.is_constrained and isinstance(error, InternalError) and error.http_status == 500:
        return InvalidRequestError(
            "No answer fits the response_format, structured_outputs or tools of this request.", code="constraint_failed"
        )
    return error


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


def _count_choices(payload: dict[str, Any], limit: int) -> int:
    """Numbers in other forms (1e6, "1000000") are refused as well, since the engine would accept them."""
    counts = [1]
    for key in _CHOICE_COUNTS:
        value = payload.get(key)
        if value is not None:
            if type(value) is not int or not 1 <= value <= limit:
                raise refuse(key, f"a whole number from 1 to {limit}")
            counts.append(value)
    prompts = payload.get("prompt")
    if isinstance(prompts, list) and len(prompts) > limit and not isinstance(prompts[0], int):
        raise InvalidRequestError(f"prompt may hold {limit} prompts at most.", param="prompt")
    return max(counts)


def add_field(body: bytes, name: str, value: Any) -> bytes:
    """A JSON object's text with a field appended, which takes effect even if the object already has it as null.
    Decoding and encoding would take time in proportion to the images in it."""
    return b"%b,%b:%b}" % (body.rstrip()[:-1], orjson.dumps(name), orjson.dumps(value))


def _find_max_tokens(payload: dict[str, Any], is_chat: bool) -> str | None:
    """The field that bounds the answer, if the client has set one."""
    names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
    return next((name for name in names if payload.get(name) is not None), None)


def _read_max_tokens(payload: dict[str, Any], is_chat: bool) -> int | None:
    name = _find_max_tokens(payload, is_chat)
    if name is None:
        return None if is_chat else _DEFAULT_COMPLETION_TOKENS
    return int(payload[name])


def _count_tool_bytes(payload: dict[str, Any]) -> int:
    """The JSON size of what a template may write besides the texts."""
    written = [payload[key] for key in ("tools", "response_format", "tool_choice") if payload.get(key) is not None]
    for message in payload.get("messages") or ():
        written += [message[key] for key in ("name", "tool_calls", "tool_call_id") if message.get(key) is not None]
    return len(orjson.dumps(written)) if written else 0


@dataclass(slots=True)
class _Content:
    """What a prompt consists of."""

    num_chars: int = 0
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    details: list[str | None] = field(default_factory=list)
    num_prompts: int = 1


def _check_prompt(payload: dict[str, Any]) -> _Content:
    """Check a prompt: a text, a list of token ids, or a list of either."""
    prompt = payload.get("prompt")
    if payload.get("echo") and payload.get("logprobs") is not None:
        # vLLM would compute a row over the whole vocabulary for every token of the prompt.
        raise InvalidRequestError("echo cannot be combined with logprobs.", param="echo")
    if isinstance(prompt, str) and prompt:
        return _Content(num_chars=len(prompt))
    prompts = [prompt] if _is_token_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(prompts):
        raise refuse("prompt", "a string, a list of token ids, or a list of either")
    if all(isinstance(text, str) for text in prompts):
        return _Content(num_chars=sum(map(len, prompts)), num_prompts=len(prompts))
    if not all(_is_token_ids(ids) for ids in prompts):
        raise refuse("prompt", "a string, a list of token ids, or a list of either")
    return _Content(num_chars=_CHARS_PER_TOKEN_ID * sum(map(len, prompts)), num_prompts=len(prompts))


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value) and bool(value)


def _check_messages(messages: Any, router: RouterSettings) -> _Content:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message.", param="messages")
    if len(messages) > router.limits.max_messages:
        raise InvalidRequestError(f"messages may hold {router.limits.max_messages} at most.", param="messages")
    found = _Content()
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequestError("Every message must be an object.", param=f"messages[{i}]")
        content = message.get("content")
        if isinstance(content, str):
            found.num_chars += len(content)
        elif isinstance(content, list):
            for j, part in enumerate(content):
                _check_part(part, f"messages[{i}].content[{j}]", found, router)
        elif content is not None:
            raise refuse(f"messages[{i}].content", "a string or a list of parts")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise refuse(f"messages[{i}].role", f"one of {', '.join(_ROLES)}")
        _check_calls(message, f"messages[{i}]")
    return found


def _check_part(part: Any, param: str, found: _Content, router: RouterSettings) -> None:
    """Accept only text and images: vLLM would fetch what other parts refer to, and accepts embeddings and keys of its
    cache (`uuid`, shared by all clients) anywhere in a part."""
    if not isinstance(part, dict):
        raise InvalidRequestError("Every content part must be an object.", param=param)
    kind = part.get("type", "image_url" if "image_url" in part else None)
    text_key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if (text_key is None and kind != "image_url") or (text_key is not None and "image_url" in part):
        raise InvalidRequestError("Content parts may be of type text, refusal and image_url.", param=f"{param}.type")
    if not _OTHER_MEDIA.isdisjoint(part):
        key = sorted(_OTHER_MEDIA.intersection(part))[0]
        raise InvalidRequestError(f"A content part may not have {key}.", param=f"{param}.{key}")
    if text_key is None:
        _check_image(part.get("image_url"), f"{param}.image_url", found, router)
        return
    text = part.get(text_key)
    if text is not None:
        if not isinstance(text, str):
            raise refuse(f"{param}.{text_key}", "a string")
        found.num_chars += len(text)


def _check_image(image: Any, param: str, found: _Content, router: RouterSettings) -> None:
    if len(found.sizes) == router.limits.max_images:
        raise InvalidRequestError(f"A request may hold {router.limits.max_images} images at most.", param=param)
    url, detail = (image.get("url"), image.get("detail")) if isinstance(image, dict) else (image, None)
    if detail is not None and (not isinstance(detail, str) or detail not in MODE_FOR_DETAIL):
        known = ", ".join(MODE_FOR_DETAIL)
        raise InvalidRequestError(f"detail must be one of {known}.", param=f"{param}.detail")
    found.sizes.append(check_image_url(url, param, router))
    found.details.append(detail)


def _check_calls(message: dict[str, Any], param: str) -> None:
    """Check the fields of a message whose types vLLM does not check."""
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise refuse(f"{param}.tool_calls", "a list")
        for k, call in enumerate(calls):
            check_function(f"{param}.tool_calls[{k}]", call)
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str | None):
            raise refuse(f"{param}.{key}", "a string")
