from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_stack import build_settings

from serving.router.accounting.token_bounds import TokenBounds, bound_tokens
from serving.router.request.parsing import add_field, parse_request
from serving.router.scheduling.work_estimate import ImageReading

SETTINGS = build_settings()
NO_IMAGES = ImageReading((), 0, "text")


def bounds(
    reading: ImageReading = NO_IMAGES,
    max_model_len: int = 8192,
    path: str = "/v1/chat/completions",
    **fields: Any,
) -> TokenBounds:
    content = {} if "prompt" in fields else {"messages": [{"role": "user", "content": "Hello"}]}
    return bound_tokens(
        parse_request(path, orjson.dumps({"model": "nano", **content, **fields}), SETTINGS), reading, max_model_len
    )


def test_a_chat_without_a_bound_may_fill_the_context() -> None:
    found = bounds()
    assert (found.longest_answer, found.num_choices) == (8191, 1)
    assert found.prompt.most >= len("Hello")
    assert bounds(max_model_len=0).longest_answer is None


@pytest.mark.parametrize(
    ("fields", "longest", "num_choices"),
    [
        ({"max_tokens": 100}, 100, 1),
        ({"max_completion_tokens": 100, "max_tokens": 5000}, 100, 1),
        ({"max_tokens": 10**6}, 8191, 1),
        ({"max_tokens": 100, "n": 4}, 100, 4),
        ({"path": "/v1/completions", "prompt": ["a", "b"], "best_of": 3, "max_tokens": 7}, 7, 6),
        ({"path": "/v1/completions", "prompt": "a"}, 16, 1),
    ],
)
def test_every_choice_of_every_prompt_counts(fields: dict[str, Any], longest: int, num_choices: int) -> None:
    found = bounds(**fields)
    assert (found.longest_answer, found.num_choices) == (longest, num_choices)


def test_images_that_nobody_knows_may_fill_the_prompt() -> None:
    assert bounds(ImageReading()).prompt.most == 8192
    assert bounds(ImageReading()).num_image_tokens is None
    assert bounds(ImageReading(("base",), 273, "base")).prompt.least >= 273


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


@given(st.lists(st.text(), min_size=1, max_size=4), st.booleans())
def test_a_token_per_byte_and_what_a_template_adds_fit(texts: list[str], has_tools: bool) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    tools: dict[str, Any] = {"tools": [TOOL]} if has_tools else {}
    found = bounds(max_model_len=10**6, messages=messages, **tools)
    written = sum(len(text.encode()) for text in texts) + (len(orjson.dumps(TOOL)) if has_tools else 0)
    assert found.prompt.most >= written + 4 * len(texts)


@given(
    st.dictionaries(st.text(min_size=1), st.none() | st.integers(0, 9) | st.text(), min_size=1),
    st.sampled_from(["", " ", "\n\t\r "]),
)
def test_an_added_field_is_the_one_that_counts(payload: dict[str, Any], end: str) -> None:
    body = add_field(orjson.dumps(payload) + end.encode(), "max_tokens", 7)
    assert orjson.loads(body) == {**payload, "max_tokens": 7}
