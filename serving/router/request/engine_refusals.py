"""Rewrites what an engine says of a request that it refuses: one sentence, the field's place, a code. Pure.

vLLM's messages name its classes, its command line and its environment variables, repeat the client's values, and hold
pydantic's dumps with links. None of that leaves the stack. A refusal that is not in the table is told without the
engine's words; the router logs those.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving.errors import EngineError, ServingError
from serving.router.request.foreign_fields import NO_TOOLS

_Found = re.Match[str]
PROMPT = "<prompt>"
"""Stands for `messages` or `prompt`, whichever the request has."""
FORMAT = "<format>"
"""Stands for `response_format` or `structured_outputs`, whichever the request has."""
_SUFFIX = re.compile(r" \(parameter=[\w.\[\]]+(?:, value=.*)?\)$|\s*\(parameter=.*\)$", re.DOTALL)
_DUMP = re.compile(r"\d+ validation errors?[\s:]")
_LOC = re.compile(r"'loc': (?:'([^']*)'|\(([^)]*)\))")
_KIND = re.compile(r"'type': '([a-z_]+)'")
_PARAM = re.compile(r"[A-Za-z_][\w.\[\]]{0,199}")
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "list": "a list",
    "dict": "an object",
    "missing": "given",
}
"""What pydantic's error types, by their beginnings, say that a value must be."""


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    say: str | Callable[[_Found], str]
    param: str | None = None
    code: str | None = None


def _rule(pattern: str, say: str | Callable[[_Found], str], param: str | None = None, code: str | None = None) -> _Rule:
    return _Rule(re.compile(pattern, re.DOTALL), say, param, code)


_TOO_LONG = "context_length_exceeded"
_BAD_SCHEMA = "The schema or pattern cannot be used: it is invalid, or has features that are not supported."
_RULES = (
    _rule(
        r"max_(?:completion_)?tokens\W.{0,40}too large.*maximum context length is (\d+) tokens",
        lambda found: (
            f"max_tokens is too large for what the prompt leaves of this model's context of {found[1]} "
            "tokens; lower it, or shorten the prompt."
        ),
        "max_tokens",
        _TOO_LONG,
    ),
    _rule(
        r"maximum context length is (\d+) tokens",
        lambda found: (
            f"The prompt is too long for this model's context of {found[1]} tokens, or leaves too little of "
            "it for max_tokens; shorten the prompt or lower max_tokens."
        ),
        PROMPT,
        _TOO_LONG,
    ),
    _rule(
        r"longer than the maximum model length of (\d+)",
        lambda found: f"The prompt is too long for this model's context of {found[1]} tokens; shorten it.",
        PROMPT,
        _TOO_LONG,
    ),
    _rule(
        r"max_model_len|encoder cache size",
        "The prompt is too long for this model's context; shorten it.",
        PROMPT,
        _TOO_LONG,
    ),
    _rule(
        r"max_tokens(?:|=\S+) (?:must|cannot|is too)",
        "max_tokens is too large for this model; lower it.",
        "max_tokens",
    ),
    _rule(r"min_tokens must be", "min_tokens must not be larger than max_tokens.", "min_tokens"),
    _rule(r"^mm_processor_kwargs: (.{1,300}?)\.?$", lambda found: f"mm_processor_kwargs: {found[1]}."),
    _rule(
        r"enable-auto-tool-choice|tool-call-parser|tool_call_parser|tool parser",
        NO_TOOLS,
        "tools",
        "tools_not_supported",
    ),
    _rule(r"`?tools`? must be set", "tool_choice needs tools.", "tool_choice"),
    _rule(r"does not match any of the specified `tools`", "tool_choice names none of the tools.", "tool_choice"),
    _rule(r"`tool_choice`", 'tool_choice must be "none", "auto", "required" or a named tool.', "tool_choice"),
    _rule(
        r"either use constraints for structured outputs or tools",
        "Use either tools or structured_outputs, not both.",
        "structured_outputs",
    ),
    _rule(
        r"only use one kind of constraints?|one kind of structured outputs",
        "Use either response_format or structured_outputs, with one constraint.",
        FORMAT,
    ),
    _rule(r"Stream options", "stream_options needs stream: true.", "stream_options"),
    _rule(r"when using `top_logprobs`", "top_logprobs needs logprobs: true.", "top_logprobs"),
    _rule(
        r"`?(?:top_)?logprobs`? .*(?:max|greater|allowed)",
        "More logprobs were asked for than the model gives; lower them.",
        "logprobs",
    ),
    _rule(
        r"(?:logit_bias|allowed_token_ids|stop_token_ids|bad_words).*(?:vocab|range|bound)|(?:vocab|range).*(?:logit_bias|allowed_token_ids)",
        "A token id is not in this model's vocabulary.",
    ),
    _rule(r"[Tt]oken id \S+ is out of vocab", "A token id is not in this model's vocabulary.", PROMPT),
    _rule(r"nested too deeply", "The schema is nested too deeply; flatten it.", FORMAT),
    _rule(
        r"grammar|xgrammar|[Rr]egex|json ?schema|JSON schema|[Ss]tructured output|guidance",
        _BAD_SCHEMA,
        FORMAT,
        "invalid_schema",
    ),
    _rule(
        r"continue_final_message",
        "continue_final_message needs add_generation_prompt: false, and an assistant's message at the end.",
        "continue_final_message",
    ),
    _rule(r"At most (\d+) image", lambda found: f"The model takes {found[1]} images in a request at most.", PROMPT),
    _rule(
        r"Failed to load image|cannot identify image|image file is truncated",
        "An image could not be decoded; it may be damaged.",
        PROMPT,
        "invalid_image",
    ),
    _rule(
        r"placeholder",
        "The prompt's text and its images do not fit together: write no <image> without an image.",
        PROMPT,
    ),
    _rule(
        r"Conversation roles|after the optional system message|roles must alternate",
        "The model's chat template does not take messages in this order of roles.",
        "messages",
    ),
    _rule(r"Either prompt or prompt_embeds|prompt.*(?:empty|at least one)", "The prompt must not be empty.", PROMPT),
    _rule(
        r"repetition_detection|max_pattern_size|min_count must",
        "repetition_detection needs min_count of 2 or more, and min_pattern_size up to max_pattern_size.",
        "repetition_detection",
    ),
    _rule(r"does not support (?:multimodal|image)|is not a multimodal model", "This model reads no images.", PROMPT),
    _rule(r"best_of", "best_of must not be smaller than n.", "best_of"),
    _rule(
        r"n must be 1 when using greedy|greedy sampling",
        "n must be 1 at temperature 0, whose answers are all equal.",
        "n",
    ),
)
_UNKNOWN = "The model cannot serve this request as it is."


def rewrite_refusal(error: ServingError, *, is_chat: bool, has_structured_outputs: bool = False) -> ServingError:
    """An engine's refusal in the stack's own words; any other error is returned as it is."""
    if not isinstance(error, EngineError) or error.http_status not in (400, 404, 413, 422):
        return error
    message = _SUFFIX.sub("", error.message).strip()
    if _DUMP.match(message) and "Value error, " not in message:
        return _build(error, *_read_dump(message, error.param))
    for rule in _RULES:
        found = rule.pattern.search(message)
        if found is not None:
            said = rule.say if isinstance(rule.say, str) else rule.say(found)
            param = _place(rule.param, is_chat, has_structured_outputs) or _clean_path(error.param)
            return _build(error, said, param, rule.code or error.code)
    param = _clean_path(error.param)
    said = f"{param} has a value that the model cannot use." if param else _UNKNOWN
    return _build(error, said, param, error.code)


def _build(error: EngineError, message: str, param: str | None, code: str | None) -> EngineError:
    kind = error.body()["error"]["type"]
    return EngineError(error.http_status, message, type=kind, param=param, code=code or "invalid_value")


def _place(param: str | None, is_chat: bool, has_structured_outputs: bool) -> str | None:
    if param == PROMPT:
        return "messages" if is_chat else "prompt"
    if param == FORMAT:
        return "structured_outputs" if has_structured_outputs else "response_format"
    return param


def _read_dump(message: str, param: str | None) -> tuple[str, str | None, str | None]:
    """Pydantic's list of errors: the first one's place and what it wants, as a sentence."""
    loc, kind = _LOC.search(message), _KIND.search(message)
    path = _clean_path(param or (loc and (loc[1] or loc[2]))) or None
    wanted = next((text for name, text in _KINDS.items() if kind and kind[1].startswith(name)), None)
    if path is None:
        return _UNKNOWN, None, None
    return f"{path} must be {wanted}." if wanted else f"{path} has a value that the model cannot use.", path, None


def _clean_path(param: Any) -> str | None:
    """`body.messages.0.ChatCompletionUserMessageParam.content.str` as a path of the client's: `messages[0].content`."""
    if not isinstance(param, str):
        return None
    steps = [step.strip(" '\"") for step in re.split(r"[.,]", param)]
    path = ""
    for step in steps:
        if step.isdigit():
            path += f"[{step}]"
        elif re.fullmatch(r"[a-z_][a-z0-9_\[\]]*", step) and step not in _INTERNAL:
            path += f".{step}" if path else step
    return path if _PARAM.fullmatch(path) else None


_INTERNAL = frozenset({"body", "str", "int", "float", "bool", "list", "dict", "input_text", "input_tokens", "union"})
