from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.resources.chat.completions import Completions as Chat
from openai.resources.completions import Completions as Texts

from serving.errors import InvalidRequestError
from serving.router.request.checks import Check
from serving.router.request.fields import CHAT_FIELDS, TEXT_FIELDS, check_fields
from serving.router.request.foreign_fields import build_header
from serving.router.request.json_schemas import is_circular

TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


def refusal(payload: dict[str, Any], checks: Mapping[str, Check] = CHAT_FIELDS) -> str | None:
    with pytest.raises(InvalidRequestError) as caught:
        check_fields(payload, checks, refuses_unknown=True)
    assert caught.value.http_status == 400
    assert len(caught.value.message) < 500
    return caught.value.param


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"temperature": 0.7, "top_p": 1, "top_k": -1, "min_p": 0.0},
        {"frequency_penalty": -2, "presence_penalty": 2.0, "repetition_penalty": 1.1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 1, "max_completion_tokens": 2**31 - 1, "min_tokens": 0},
        {"stop": "end"},
        {"stop": ["a"] * 16},
        {"stop_token_ids": [0, 1], "allowed_token_ids": [5], "bad_words": ["no"]},
        {"logit_bias": {"100": -100, "7": 0.5}},
        {"logprobs": True, "top_logprobs": 20},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": None}},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "read"}}},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
        {"structured_outputs": {"json": '{"type": "object"}'}},
        {"structured_outputs": {"json": {"type": "array", "maxItems": 1000}, "disable_any_whitespace": True}},
        {"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}", "json": None}},
        {"structured_outputs": {"regex": r"a{,3}b{2,}{x}"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"vllm_xargs": {"ngram_size": 0, "window_size": 90, "whitelist_token_ids": [1, 2], "repeated_tokens": 0}},
        {"mm_processor_kwargs": {"mode": "base"}},
        {"repetition_detection": {"max_pattern_size": 10, "min_count": 3}},
        {"ignore_eos": True, "return_token_ids": True, "user": "me", "metadata": {"a": "b"}, "store": False},
        {"reasoning_effort": "low", "verbosity": "high", "service_tier": "auto", "modalities": ["text"]},
        dict.fromkeys([*CHAT_FIELDS, "please"]),
    ],
)
def test_what_clients_send_passes(fields: dict[str, Any]) -> None:
    check_fields(fields, CHAT_FIELDS, refuses_unknown=True)


@pytest.mark.parametrize(
    "fields", [{"logprobs": 5, "echo": False, "suffix": "end", "best_of": 2}, dict.fromkeys(TEXT_FIELDS)]
)
def test_what_clients_send_to_completions_passes(fields: dict[str, Any]) -> None:
    check_fields(fields, TEXT_FIELDS, refuses_unknown=True)


@pytest.mark.parametrize(
    "key",
    [
        *("priority", "kv_transfer_params", "ec_transfer_params", "chat_template", "documents", "media_io_kwargs"),
        *("prompt_embeds", "mm_payload", "prompt_logprobs", "logprob_token_ids", "use_beam_search"),
        *("routed_experts_prompt_start", "return_prompt_text", "trace_decode_token_ids", "watermarking"),
        *("guided_regex", "guided_json", "guided_choice", "service_tier", "", "x" * 10_000),
    ],
)
@pytest.mark.parametrize("checks", [CHAT_FIELDS, TEXT_FIELDS], ids=["chat", "completion"])
def test_what_is_not_for_the_public_is_refused(key: str, checks: Mapping[str, Check]) -> None:
    assert refusal({key: 1}, checks) == key[:100]


HARMLESS: list[dict[str, Any]] = [
    {"priority": 0, "use_beam_search": False, "length_penalty": 1.0, "cache_salt": "a", "request_id": "b"},
    {"chat_template_kwargs": {"enable_thinking": False}, "reasoning": {"effort": "low"}, "session_id": "s"},
    {"documents": [], "media_io_kwargs": {}, "return_prompt_text": False, "thinking_token_budget": 5},
    {"service_tier": "auto", "store": True, "prompt_cache_key": "k", "prompt_cache_retention": "24h"},
    {"provider": {"order": ["a"]}, "transforms": []},
]
HARMLESS_CHAT: list[dict[str, Any]] = [
    {"echo": False, "functions": [], "function_call": "none", "modalities": ["text"], "prediction": {"content": "a"}},
    {"reasoning_effort": "low", "verbosity": "high", "include_reasoning": True, "tools": []},
]


@pytest.mark.parametrize(
    ("fields", "checks"),
    [(fields, checks) for checks in (CHAT_FIELDS, TEXT_FIELDS) for fields in HARMLESS]
    + [(fields, CHAT_FIELDS) for fields in HARMLESS_CHAT],
)
def test_what_has_no_effect_is_left_out_and_named(fields: dict[str, Any], checks: Mapping[str, Check]) -> None:
    report = check_fields(fields, checks, refuses_unknown=True)
    assert report.ignored == report.dropped == list(fields)


@pytest.mark.parametrize(
    "fields",
    [
        *({"priority": 1}, {"priority": False}, {"use_beam_search": True}, {"echo": True}, {"documents": [{"a": "b"}]}),
        *({"functions": [{"name": "f"}]}, {"function_call": {"name": "f"}}, {"audio": {"voice": "a"}}),
        *({"modalities": ["text", "audio"]}, {"moderation": {}}, {"web_search_options": {}}, {"store": "yes"}),
        *({"service_tier": "flex"}, {"service_tier": "priority"}, {"chat_template": "{{ 1 }}"}),
    ],
)
def test_what_would_change_the_answer_is_refused(fields: dict[str, Any]) -> None:
    assert refusal(fields) == next(iter(fields))


def test_names_that_nobody_knows_are_ignored_or_refused_as_the_settings_say() -> None:
    report = check_fields({"temprature": 1, "n": None, "x": None}, CHAT_FIELDS, refuses_unknown=False)
    assert (report.ignored, report.dropped) == (["temprature"], ["temprature", "n", "x"])
    assert refusal({"temprature": 1}) == "temprature"


@pytest.mark.parametrize(
    ("create", "checks"),
    [
        (Chat.create, CHAT_FIELDS),
        (Chat.parse, CHAT_FIELDS),
        (Texts.create, TEXT_FIELDS),
    ],
)
def test_every_field_of_the_official_client_is_known(create: Callable[..., Any], checks: Mapping[str, Check]) -> None:
    local = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(inspect.signature(create).parameters) - local <= checks.keys()


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["a", "b[0].c"], b"a, b[0].c"),
        (["a\r\nset-cookie: b", "\u00e9,"], b"a%0D%0Aset-cookie%3A%20b, %C3%A9%2C"),
        (["x" * 1000], b"x" * 64),
        (["a"] * 21, b", ".join([b"a"] * 20) + b", ..."),
    ],
)
def test_a_header_names_what_was_ignored(names: list[str], value: bytes) -> None:
    assert build_header(names) == (b"x-ignored-parameters", value)


def test_each_path_has_its_own_fields() -> None:
    assert refusal({"prompt": "Once"}, CHAT_FIELDS) == "prompt"
    assert refusal({"messages": []}, TEXT_FIELDS) == "messages"
    assert refusal({"tools": []}, TEXT_FIELDS) == "tools"


@pytest.mark.parametrize("value", [[], {}, "1", True, 1e6, 2**70, -(2**70)])
@pytest.mark.parametrize(
    "key", ["max_tokens", "max_completion_tokens", "min_tokens", "top_k", "seed", "top_logprobs", "stream_interval"]
)
def test_whole_numbers_have_one_spelling(key: str, value: Any) -> None:
    assert refusal({key: value}) == key


@pytest.mark.parametrize("value", [[], {}, "1", True, 1e300, -1e300])
@pytest.mark.parametrize("key", ["temperature", "top_p", "min_p", "frequency_penalty", "repetition_penalty"])
def test_numbers_have_bounds(key: str, value: Any) -> None:
    assert refusal({key: value}) == key


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"١": 1}}, "logit_bias"),
        ({"logit_bias": {"1": float("101")}}, "logit_bias"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"vllm_xargs": {"ngram_size": True}}, "vllm_xargs.ngram_size"),
        ({"vllm_xargs": {"other": 1}}, "vllm_xargs"),
        ({"repetition_detection": {"min_count": -1}}, "repetition_detection.min_count"),
        ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a{500}){500}"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a{1001}"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a{1,99999999999999}"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"maxLength": 10**9}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"tools": [{**TOOL, "function": {"name": "a", "parameters": {"$ref": "#"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{**TOOL, "function": {"name": "a", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_stands(fields: dict[str, Any], param: str) -> None:
    assert refusal(fields) == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "json", "regex", "pattern", "$ref", "anyOf", "schema"]), inner
        )
    ),
    max_leaves=10,
)


@given(st.sampled_from(sorted({*CHAT_FIELDS, *TEXT_FIELDS})), JSON)
def test_arbitrary_values_raise_nothing_but_their_own_error(key: str, value: Any) -> None:
    for checks in (CHAT_FIELDS, TEXT_FIELDS):
        with contextlib.suppress(InvalidRequestError):
            check_fields({key: value}, checks, refuses_unknown=True)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, False),
        ({"$ref": "#"}, True),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, True),
        ({"allOf": [{"oneOf": [{"$ref": "#/allOf/0"}]}]}, True),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, True),
        ({"$defs": {"a/b~c": {"$ref": "#/$defs/a~1b~0c"}}}, True),
        ({"properties": {"a": {"$ref": "#"}}}, False),
        ({"items": {"$ref": "#"}}, False),
        ({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}]}}}, True),
        ({"$defs": {"a": {"type": "null"}}, "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}, False),
        ({"$ref": "#/nowhere/9"}, False),
        ({"$ref": "#/anyOf/99999999999", "anyOf": []}, False),
        ({"$ref": "http://example.com/#"}, False),
        ({"$ref": 3, "anyOf": 3}, False),
        ({"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(3000)}}, False),
        ({"$defs": {str(n): {"$ref": f"#/$defs/{(n + 1) % 3000}"} for n in range(3000)}}, True),
    ],
)
def test_schemas_that_run_in_circles_are_told_from_trees(schema: dict[str, Any], expected: bool) -> None:
    assert is_circular(schema) is expected
