"""What vLLM 0.32 says of requests that it refuses, and what the client is told."""

from __future__ import annotations

import re

import pytest

from serving.errors import InternalError, from_engine
from serving.router.request.engine_refusals import rewrite_refusal
from serving.router.request.foreign_fields import NO_TOOLS

DUMP = """2 validation errors:
  {'type': 'string_type', 'loc': 'body.messages.0.ChatCompletionUserMessageParam.content.str', 'msg': 'Input should be \
a valid string', 'input': None, 'url': 'https://errors.pydantic.dev/2.14/v/string_type'}
  {'type': 'list_type', 'loc': 'body.messages.0.content', 'msg': 'Input should be a valid list', 'input': None}"""
LONG = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains 3000 input tokens, which "
    "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
    "(parameter=input_tokens, value=3000)"
)
CASES = [
    (
        DUMP,
        "body.messages.0.ChatCompletionUserMessageParam.content.str",
        "messages[0].content must be a string.",
        "messages[0].content",
        "invalid_value",
    ),
    (
        "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.seed', 'msg': 'Input should be a valid integer'}",
        None,
        "seed must be a whole number.",
        "seed",
        "invalid_value",
    ),
    (
        "1 validation error:\n  {'type': 'bool_type', 'loc': ('body', 'ignore_eos'), 'msg': 'x'}",
        None,
        "ignore_eos must be true or false.",
        "ignore_eos",
        "invalid_value",
    ),
    (
        "1 validation error:\n  {'type': 'value_error', 'loc': ('body',), 'msg': 'Value error, Stream options can only "
        "be defined when `stream=True`.', 'ctx': {'error': VLLMValidationError('...')}}",
        "stream_options",
        "stream_options needs stream: true.",
        "stream_options",
        "invalid_value",
    ),
    (
        LONG,
        "input_tokens",
        "The prompt is too long for this model's context of 2048 tokens, or leaves",
        "messages",
        "context_length_exceeded",
    ),
    (
        "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is 2048 "
        "tokens and your request has 7 input tokens (5000 > 2048 - 7).",
        "max_tokens",
        "max_tokens is too large for what the prompt",
        "max_tokens",
        "context_length_exceeded",
    ),
    (
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        None,
        NO_TOOLS,
        "tools",
        "tools_not_supported",
    ),
    (
        "mm_processor_kwargs: mode must be one of tiny, small. (parameter=mm_processor_kwargs)",
        "mm_processor_kwargs",
        "mm_processor_kwargs: mode must be one of tiny, small.",
        "mm_processor_kwargs",
        "invalid_value",
    ),
    (
        "Failed to transform json schema into a grammar: [22:13:03] /project/cpp/json_schema_converter.cc:612",
        None,
        "The schema or pattern cannot be used",
        "response_format",
        "invalid_schema",
    ),
    (
        "token_id(s) [99999] in logit_bias contain out-of-vocab token ids. Vocabulary size: 320 "
        "(parameter=logit_bias, value=[99999])",
        "logit_bias",
        "A token id is not in this model's vocabulary.",
        "logit_bias",
        "invalid_value",
    ),
    (
        "Failed to load image: cannot identify image file <_io.BytesIO object>",
        None,
        "An image could not be decoded",
        "messages",
        "invalid_image",
    ),
    (
        "frobnicate() got an unexpected keyword argument 'x' in <class 'vllm.Foo'>; see https://docs.vllm.ai",
        None,
        "The model cannot serve this request as it is.",
        None,
        "invalid_value",
    ),
    ("something of VLLM_MAX_N_SEQUENCES", "n", "n has a value that the model cannot use.", "n", "invalid_value"),
]


@pytest.mark.parametrize(("message", "param", "said", "place", "code"), CASES)
def test_a_refusal_is_told_in_one_sentence_with_its_place(
    message: str, param: str | None, said: str, place: str | None, code: str
) -> None:
    refusal = from_engine(400, {"error": {"message": message, "type": "BadRequestError", "param": param, "code": 400}})
    told = rewrite_refusal(refusal, is_chat=True)
    assert told.message.startswith(said)
    assert (told.http_status, told.param, told.code) == (400, place, code)
    assert "\n" not in told.message
    assert not re.search(r"pydantic|https?://|vllm|VLLM|class|--\w|0x|parameter=", told.message)


def test_the_place_is_a_field_that_the_request_has() -> None:
    refusal = from_engine(400, {"error": {"message": LONG}})
    assert rewrite_refusal(refusal, is_chat=False).param == "prompt"
    refusal = from_engine(400, {"error": {"message": "Regex uses unsupported feature"}})
    assert rewrite_refusal(refusal, is_chat=True, has_structured_outputs=True).param == "structured_outputs"


@pytest.mark.parametrize("param", ["x" * 10_000, "a\r\nb", "<script>", "", "body", "0"])
def test_a_place_that_is_no_path_is_not_told(param: str) -> None:
    refusal = from_engine(400, {"error": {"message": "no", "param": param}})
    told = rewrite_refusal(refusal, is_chat=True)
    assert told.param is None or re.fullmatch(r"[\w.\[\]]{1,200}", told.param)


def test_failures_are_left_alone() -> None:
    failure = InternalError("The model failed.")
    assert rewrite_refusal(failure, is_chat=True) is failure
    slow = from_engine(429, {"error": {"message": "slow"}})
    assert rewrite_refusal(slow, is_chat=True) is slow
