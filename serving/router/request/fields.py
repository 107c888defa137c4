"""The fields that a public request may have, and their values. Pure.

The engine's own checks come later and are more detailed. These keep from it:
- fields that control the engine (`priority`, `request_id`, `kv_transfer_params`, `cache_salt`, ...), make it run the
  client's code (`chat_template`) or fetch things (`media_io_kwargs`), or let a small request use up all memory
  (`prompt_logprobs`: a row of the whole vocabulary per prompt token; `use_beam_search`);
- types and sizes that make vLLM 0.32 fail with a 5xx, or expand far beyond their size in the request (schemas).

This is an allowlist: the engine gets no field that is not listed here; `foreign_fields` says what becomes of others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from serving.errors import InvalidRequestError
from serving.router.request.checks import (
    MAX_INT,
    Check,
    an_object,
    anything,
    flag,
    number,
    one_of,
    refuse,
    text,
    texts,
    token_ids,
    whole,
)
from serving.router.request.foreign_fields import FOREIGN, FOREIGN_CHAT, NOT_NULL
from serving.router.request.json_schemas import is_circular

_MAX_SPEC_BYTES = 64 * 1024
"""The most JSON of tools, schemas and grammars."""
_MAX_REPEAT = 1000
_MAX_REPEATS = 100_000
"""The product of one pattern's repetition counts: `(a{1000}){1000}` is 15 characters and a million states."""
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
_SIZED = re.compile(r"(?:min|max)(?:Items|Length|Properties|Contains)")
_XARGS = frozenset({"ngram_size", "window_size", "whitelist_token_ids", "repeated_tokens"})
"""The plugin's arguments; any other name may belong to one of vLLM's connectors."""
_KINDS = ("json", "regex", "choice", "json_object")
"""Not `grammar`: vLLM answers 500 to an invalid or unsatisfiable one, and only its compilers can find out."""
_STRUCTURED = frozenset({*_KINDS, "whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"})
_FORMATS = ("text", "json_object", "json_schema")
_MAX_TOOLS = 128


class FieldReport:
    """What becomes of a body's fields."""

    __slots__ = ("dropped", "ignored")

    def __init__(self) -> None:
        self.ignored: list[str] = []
        """Names of fields that have no effect here, for the client."""
        self.dropped: list[str] = []
        """Fields that the engine does not get."""


def check_fields(payload: Mapping[str, Any], checks: Mapping[str, Check], *, refuses_unknown: bool) -> FieldReport:
    """Check the values of known fields, and find those that have no effect.

    Raises:
        InvalidRequestError: with the field as `param`.
    """
    report = FieldReport()
    for key, value in payload.items():
        check = checks.get(key)
        if value is None:
            if check is None or key in NOT_NULL:
                report.dropped.append(key)
        elif check is None:
            if refuses_unknown:
                shown = key[:100]
                raise InvalidRequestError(f"Unknown parameter: '{shown}'.", param=shown, code="unknown_parameter")
            report.ignored.append(key)
            report.dropped.append(key)
        elif check(key, value):
            report.ignored.append(key)
            report.dropped.append(key)
    return report


def _stop(key: str, value: Any) -> None:
    texts(16, 256)(key, [value] if isinstance(value, str) else value)


def _logit_bias(key: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > 1024:
        raise refuse(key, "an object with at most 1024 token ids")
    bias = number(-100, 100)
    for token, weight in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= MAX_INT):
            raise refuse(key, "an object with token ids for keys")
        bias(key, weight)


def _stream_options(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise refuse(key, "an object")
    for name, wanted in value.items():
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            raise refuse(key, "an object with include_usage")
        if wanted is not None and not isinstance(wanted, bool):
            raise refuse(f"{key}.{name}", "true or false")


def _usage(key: str, value: Any) -> None:
    """OpenRouter's way to ask for a stream's usage."""
    if not isinstance(value, dict) or not isinstance(value.get("include"), bool | None):
        raise refuse(key, "an object with include")


def _xargs(key: str, value: Any) -> None:
    if not isinstance(value, dict) or not _XARGS.issuperset(value):
        raise refuse(key, f"an object with {', '.join(sorted(_XARGS))}")
    for name, given in value.items():
        values = given if isinstance(given, list) else [given]
        if len(values) > 1024 or not all(type(one) is int and 0 <= one <= MAX_INT for one in values):
            raise refuse(f"{key}.{name}", "a whole number or, for token ids, a list of them")


def _repetition(key: str, value: Any) -> None:
    names = ("max_pattern_size", "min_pattern_size", "min_count")
    if not isinstance(value, dict) or not set(value) <= set(names):
        raise refuse(key, f"an object with {', '.join(names)}")
    for name, size in value.items():
        whole(0, 4096)(f"{key}.{name}", size)


def _response_format(key: str, value: Any) -> None:
    if not isinstance(value, dict) or value.get("type") not in _FORMATS:
        raise InvalidRequestError(f"{key}.type must be one of {', '.join(_FORMATS)}.", param=f"{key}.type")
    if value["type"] == "json_schema":
        spec = value.get("json_schema")
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise refuse(f"{key}.json_schema", "an object with a name and a schema")
        if not isinstance(spec.get("schema"), dict):
            raise refuse(f"{key}.json_schema.schema", "an object")
        check_references(f"{key}.json_schema.schema", spec["schema"])
    _spec(key, value)


def _structured_outputs(key: str, value: Any) -> None:
    if not isinstance(value, dict) or not _STRUCTURED.issuperset(value):
        raise refuse(key, f"an object with {', '.join(sorted(_STRUCTURED))}")
    if sum(value.get(kind) is not None for kind in _KINDS) != 1:
        raise refuse(key, f"an object with exactly one of {', '.join(_KINDS)}")
    for name, given in value.items():
        param = f"{key}.{name}"
        if given is None:
            continue
        if name == "choice":
            texts(1024, 1024)(param, given)
            if not given:
                raise refuse(param, "a list with at least one string")
        elif name == "json":
            schema = _parse_schema(param, given)
            _spec(param, schema)
            check_references(param, schema)
        elif name in ("regex", "whitespace_pattern"):
            text(_MAX_SPEC_BYTES)(param, given)
            _pattern(param, given)
        else:
            flag(param, given)


def _parse_schema(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str) and len(value) <= _MAX_SPEC_BYTES:
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise refuse(key, "a JSON schema") from error
    if not isinstance(value, dict):
        raise refuse(key, "a JSON schema")
    return value


def _spec(key: str, value: Any) -> None:
    """Bound a schema's size, and what its counts and patterns would expand to."""
    if len(orjson.dumps(value)) > _MAX_SPEC_BYTES:
        raise refuse(key, f"at most {_MAX_SPEC_BYTES} bytes of JSON")
    values: list[Any] = [value]
    largest = 0.0
    while values:
        found = values.pop()
        if isinstance(found, list):
            values.extend(found)
        elif isinstance(found, dict):
            for name, inner in found.items():
                if name == "pattern" and isinstance(inner, str):
                    _pattern(key, inner)
                elif _SIZED.fullmatch(name) and isinstance(inner, int | float):
                    largest = max(largest, inner)
                else:
                    values.append(inner)
    if largest > _MAX_REPEATS:
        raise refuse(key, f"a schema with lengths and counts of at most {_MAX_REPEATS}")


def _pattern(key: str, pattern: str) -> None:
    product = 1
    for least, most in _REPEAT.findall(pattern):
        count = max((int(digits[:10]) for digits in (least, most) if digits), default=0)
        if least or most:
            product *= max(1, count)
            if count > _MAX_REPEAT or product > _MAX_REPEATS:
                raise refuse(key, f"a pattern with repetitions of at most {_MAX_REPEAT}, {_MAX_REPEATS} multiplied")


def check_references(key: str, schema: Mapping[str, Any]) -> None:
    """Refuse a schema that only refers to itself, which no value can satisfy: vLLM answers it with 500."""
    if is_circular(schema):
        raise refuse(key, "a schema that does not refer to itself with nothing in between")


def _tools(key: str, value: Any) -> bool:
    if value == []:
        return True
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_TOOLS:
        raise refuse(key, f"a list of 1 to {_MAX_TOOLS} tools")
    for i, tool in enumerate(value):
        check_function(f"{key}[{i}]", tool)
    _spec(key, value)
    return False


def check_function(key: str, tool: Any) -> None:
    """Check a tool or a tool call: `{"type": "function", "function": {"name": ...}}`."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise refuse(key, "an object of type function with a named function")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise refuse(f"{key}.function.parameters", "an object")
    check_references(f"{key}.function.parameters", function.get("parameters") or {})


def _tool_choice(key: str, value: Any) -> None:
    if value not in ("none", "auto", "required"):
        check_function(key, value)


_penalty = number(-2, 2)

_BOTH: dict[str, Check] = {
    **FOREIGN,
    "model": anything,
    "n": anything,
    "best_of": anything,
    "stream": flag,
    "stream_options": _stream_options,
    "usage": _usage,
    "max_tokens": whole(1, MAX_INT),
    "temperature": number(0, 2),
    "top_p": number(0, 1, is_open=True),
    "top_k": whole(-1, MAX_INT),
    "min_p": number(0, 1),
    "frequency_penalty": _penalty,
    "presence_penalty": _penalty,
    "repetition_penalty": number(0, 100, is_open=True),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stop_token_ids": token_ids(256),
    "bad_words": texts(256, 256),
    "allowed_token_ids": token_ids(4096),
    "logit_bias": _logit_bias,
    "min_tokens": whole(0, MAX_INT),
    "ignore_eos": flag,
    "include_stop_str_in_output": flag,
    "skip_special_tokens": flag,
    "spaces_between_special_tokens": flag,
    "add_special_tokens": flag,
    "truncate_prompt_tokens": whole(-1, MAX_INT),
    "truncation_side": one_of("left", "right"),
    "return_token_ids": flag,
    "return_tokens_as_token_ids": flag,
    "stream_interval": whole(1, 1024),
    "repetition_detection": _repetition,
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "vllm_xargs": _xargs,
    "mm_processor_kwargs": an_object,
    "user": text(MAX_INT),
    "metadata": an_object,
    "safety_identifier": text(512),
}

CHAT_FIELDS: Mapping[str, Check] = {
    **_BOTH,
    **FOREIGN_CHAT,
    "messages": anything,
    "max_completion_tokens": whole(1, MAX_INT),
    "logprobs": flag,
    "top_logprobs": whole(0, 20),
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": flag,
    "add_generation_prompt": flag,
    "continue_final_message": flag,
}

TEXT_FIELDS: Mapping[str, Check] = {
    **_BOTH,
    "prompt": anything,
    "logprobs": whole(0, 20),
    "echo": flag,
    "suffix": text(4096),
}
