"""Parses and checks a request's body, once, before its bytes are relayed. Pure.

`fields` checks single fields. What depends on the model (context length, vocabulary, an image's pixels) is left to the
engine; vLLM's own error is then converted to OpenAI's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from serving.errors import InternalError, InvalidRequestError, ModelNotFoundError, ModeNotSupportedError, ServingError
from serving.http.bodies import decode_json
from serving.plugin.modes.selection import DEFAULT
from serving.router.request.checks import refuse
from serving.router.request.engine_refusals import rewrite_refusal
from serving.router.request.fields import CHAT_FIELDS, TEXT_FIELDS, FieldReport, check_fields
from serving.router.request.messages import MODE_FOR_DETAIL, Content, DocumentPart, check_messages
from serving.settings.router import StreamUsage
from serving.settings.stack import Settings

_CHOICE_COUNTS = ("n", "best_of")
_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's and vLLM's default for completions; a chat's default is the rest of the context."""
_WRITTEN = frozenset({"tools", "response_format", "tool_choice"})
"""Fields that a chat template may write into the prompt."""
_CHARS_PER_TOKEN_ID = 3
"""How many characters a token id in a prompt counts for."""

ImageConfigs = Callable[[str], Mapping[str, Any]]
"""A model's image settings (`serving.plugin.modes.selection.ModeRules`); empty if they are unknown."""


def _unknown_config(model: str) -> Mapping[str, Any]:
    return {}


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
    ignored: tuple[str, ...] = ()
    """Fields of the client's that have no effect."""
    documents: tuple[DocumentPart, ...] = ()
    """To be read by the OCR service instead of the engine."""

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    def with_max_tokens(self, num_tokens: int) -> RoutedRequest:
        """The same request with a bound on its answer that the client has not set."""
        return replace(self, body=add_field(self.body, "max_tokens", num_tokens), max_tokens=num_tokens)


def parse_request(
    path: str,
    body: bytes,
    settings: Settings,
    image_configs: ImageConfigs = _unknown_config,
    stream_usage: StreamUsage = "asked",
) -> RoutedRequest:
    """Parse and check a complete body.

    Args:
        path: the engine's path for it.
        body: as the client sent it, decoded.
        settings: models, limits, and what becomes of unknown fields.
        image_configs: gives a model's image settings, as its replicas report them.
        stream_usage: where a stream has its usage unless the body says so.

    Raises:
        RequestError: what is wrong with it.
    """
    payload = decode_json(body, settings.router.limits)
    model = find_model(payload.get("model"), settings)
    is_chat = path.endswith("/chat/completions")
    num_choices = _count_choices(payload, settings.router.limits.max_choices)
    refuses_unknown = settings.router.unknown_fields == "refuse"
    report = check_fields(payload, CHAT_FIELDS if is_chat else TEXT_FIELDS, refuses_unknown=refuses_unknown)
    if is_chat:
        content = check_messages(payload.get("messages"), settings.router)
    else:
        content = _check_prompt(payload)
        num_choices *= content.num_prompts
        if num_choices > settings.router.limits.max_choices:
            raise refuse("prompt", f"at most {settings.router.limits.max_choices} prompts times n")
    asks_usage = _wants_stream_usage(payload)
    options = _choose_image_options(payload, model, content, image_configs)
    body = _build_body(payload, body, report, content)
    max_tokens_field = _find_max_tokens(payload, is_chat)
    return RoutedRequest(
        path=path,
        model=model,
        body=body,
        image_sizes=tuple(content.sizes),
        image_options=options,
        is_stream=bool(payload.get("stream")),
        wants_stream_usage=asks_usage or stream_usage == "extra_chunk",
        usage_in_last_chunk=stream_usage == "finish_chunk" and not asks_usage,
        num_text_chars=content.num_chars,
        num_tool_bytes=_count_tool_bytes(payload),
        max_tokens=_read_max_tokens(payload, max_tokens_field, is_chat),
        max_tokens_field=max_tokens_field,
        num_choices=num_choices,
        num_prompts=content.num_prompts,
        num_messages=len(payload["messages"]) if is_chat else 1,
        is_constrained=_is_constrained(payload),
        ignored=tuple(report.ignored),
        documents=tuple(content.documents),
    )


def _build_body(payload: dict[str, Any], body: bytes, report: FieldReport, content: Content) -> bytes:
    """The engine's body: the client's own bytes, unless something in it has changed or is left out."""
    dropped = report.dropped
    if "tool_choice" in payload and payload["tool_choice"] in ("none", "auto") and not payload.get("tools"):
        dropped.append("tool_choice")  # vLLM refuses it without tools
    if "stream_options" in payload and not payload.get("stream"):
        dropped.append("stream_options")  # vLLM refuses it without a stream
    if dropped or content.is_changed:
        for name in dropped:
            payload.pop(name, None)
        body = orjson.dumps(payload)
    if content.sizes and _keeps_special_tokens(payload):
        body = add_field(body, "skip_special_tokens", False)
    return body


def _choose_image_options(
    payload: dict[str, Any], model: str, content: Content, image_configs: ImageConfigs
) -> Mapping[str, Any]:
    """The image options of the engine's body, to which the modes that OpenAI's `detail` asks for are added: the engine
    does not know `detail`.

    Raises:
        ModeNotSupportedError: options for a model that has none.
    """
    options: dict[str, Any] = payload.get("mm_processor_kwargs") or {}
    if not options and not any(content.details):
        return options
    config = image_configs(model)
    if config.get("is_fixed"):
        if options:
            raise ModeNotSupportedError(
                "This model reads pages in one resolution mode; remove mm_processor_kwargs.",
                param="mm_processor_kwargs",
            )
    elif any(content.details) and "mode" not in options:
        options = {**options, "mode": _choose_modes(content.details, config.get("modes", ()))}
        payload["mm_processor_kwargs"] = options
        content.is_changed = True
    return options


def _choose_modes(details: Sequence[str | None], trained: Collection[str]) -> list[str]:
    """A mode for every image. One that the model was not trained for reads worse, whatever `detail` asks for."""
    modes = [MODE_FOR_DETAIL.get(detail or "", DEFAULT) for detail in details]
    return [mode if mode in trained or not trained else DEFAULT for mode in modes]


def _wants_stream_usage(payload: Mapping[str, Any]) -> bool:
    """Whether the client asked for a usage chunk, in OpenAI's way or in OpenRouter's."""
    options, usage = payload.get("stream_options"), payload.get("usage")
    return bool((options and options.get("include_usage")) or (usage and usage.get("include")))


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


def explain_refusal(request: RoutedRequest, error: ServingError) -> ServingError:
    """What the client is told of an engine's error.

    vLLM answers 500 if no text can match a request's grammar (`[^\\s\\S]`), which cannot be known beforehand. If that
    counted against the replica, a client could disable it.
    """
    if request.is_constrained and isinstance(error, InternalError) and error.http_status == 500:
        return InvalidRequestError(
            "No answer fits the response_format, structured_outputs or tools of this request.", code="constraint_failed"
        )
    has_structured_outputs = request.is_constrained and b'"structured_outputs"' in request.body
    return rewrite_refusal(error, is_chat=request.is_chat, has_structured_outputs=has_structured_outputs)


def find_model(name: Any, settings: Settings) -> str:
    """The canonical name of the model that a body names.

    Raises:
        InvalidRequestError: it names none.
        ModelNotFoundError: there is no such model.
    """
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
    if is_chat and payload.get("max_completion_tokens") is not None:
        return "max_completion_tokens"
    return "max_tokens" if payload.get("max_tokens") is not None else None


def _read_max_tokens(payload: dict[str, Any], name: str | None, is_chat: bool) -> int | None:
    if name is None:
        return None if is_chat else _DEFAULT_COMPLETION_TOKENS
    return int(payload[name])


def _count_tool_bytes(payload: dict[str, Any]) -> int:
    """The JSON size of what a template may write besides the texts."""
    written = (
        [payload[key] for key in _WRITTEN if payload.get(key) is not None] if not _WRITTEN.isdisjoint(payload) else []
    )
    for message in payload.get("messages") or ():
        if len(message) > 2:  # besides role and content
            written += [message[key] for key in ("name", "tool_calls", "tool_call_id") if message.get(key) is not None]
    return len(orjson.dumps(written)) if written else 0


def _check_prompt(payload: dict[str, Any]) -> Content:
    """Check a prompt: a text, a list of token ids, or a list of either."""
    prompt = payload.get("prompt")
    if payload.get("echo") and payload.get("logprobs") is not None:
        # vLLM would compute a row over the whole vocabulary for every token of the prompt.
        raise InvalidRequestError("echo cannot be combined with logprobs.", param="echo")
    if isinstance(prompt, str) and prompt:
        return Content(num_chars=len(prompt))
    prompts = [prompt] if _is_token_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(prompts):
        raise refuse("prompt", "a string, a list of token ids, or a list of either")
    if all(isinstance(text, str) for text in prompts):
        return Content(num_chars=sum(map(len, prompts)), num_prompts=len(prompts))
    if not all(_is_token_ids(ids) for ids in prompts):
        raise refuse("prompt", "a string, a list of token ids, or a list of either")
    return Content(num_chars=_CHARS_PER_TOKEN_ID * sum(map(len, prompts)), num_prompts=len(prompts))


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value) and bool(value)
