from __future__ import annotations

import base64
import io
from typing import Any

import orjson
import pytest
from PIL import Image

from serving.engine.scripted.requests import ScriptedRefusalError, ScriptedRequest, read_request
from serving.settings.stack import ScriptSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCRIPT = ScriptSettings(output_tokens=64, max_model_len=1000)


def read(path: str = CHAT, script: ScriptSettings = SCRIPT, **fields: Any) -> ScriptedRequest:
    if path == CHAT:
        fields = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    return read_request(path, orjson.dumps({"model": "nano", **fields}), script, ("nano", "alias"))


def build_page(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def show(*urls: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]


def test_four_bytes_of_text_are_a_token_and_the_prompt_begins_with_one() -> None:
    assert read().prompt_tokens == 1 + 2
    assert read(TEXT, prompt="Hello").prompt_tokens == 1 + 2


def test_prompts_come_as_texts_or_token_ids() -> None:
    request = read(TEXT, prompt=["Hello", [1, 2, 3]], n=2)
    assert request.prompt_tokens == 1 + 2 + 3
    assert request.num_choices == 4
    assert read(TEXT, prompt=[1, 2, 3]).prompt_tokens == 3


@pytest.mark.parametrize(
    ("size", "options", "num_tokens"),
    [
        ((600, 600), {}, 16 * 17 + 1),
        ((600, 600), {"mode": "tiny"}, 8 * 9 + 1),
        ((1280, 1920), {"mode": "gundam"}, 16 * 17 + 1 + 30 * 21),
    ],
)
def test_an_image_has_the_tokens_of_its_mode(size: tuple[int, int], options: dict[str, str], num_tokens: int) -> None:
    request = read(messages=show(build_page(*size)), mm_processor_kwargs=options)
    assert request.image_tokens == num_tokens
    assert request.prompt_tokens == num_tokens + 1


def test_an_image_that_cannot_be_read_is_taken_for_a_page() -> None:
    assert read(messages=show("data:image/png;base64,AAAA")).image_tokens == 16 * 17 + 1 + 30 * 21


@pytest.mark.parametrize(
    ("fields", "num_tokens", "reason"),
    [
        ({}, 64, "stop"),
        ({"max_tokens": 64}, 64, "stop"),
        ({"max_tokens": 10}, 10, "length"),
        ({"max_completion_tokens": 10, "max_tokens": 20}, 10, "length"),
        ({"max_tokens": 100, "ignore_eos": True}, 100, "length"),
        ({"max_tokens": 100, "min_tokens": 80}, 80, "stop"),
        ({"ignore_eos": True}, 1000 - 3, "length"),
    ],
)
def test_an_answer_is_as_long_as_script_and_request_say(fields: dict[str, Any], num_tokens: int, reason: str) -> None:
    request = read(**fields)
    assert (request.output_tokens, request.finish_reason) == (num_tokens, reason)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model":"gpt","messages":[]}', 404),
        (b'{"model":"nano"}', 400),
        (b'{"model":"nano","messages":[],"max_tokens":0}', 400),
        (b'{"model":"nano","messages":[],"n":"2"}', 400),
        (b'{"model":"nano","messages":[{"content":"%b"}]}' % (b"x" * 4000), 400),
    ],
)
def test_what_vllm_refuses_is_refused(body: bytes, status: int) -> None:
    with pytest.raises(ScriptedRefusalError) as caught:
        read_request(CHAT, body, SCRIPT, ("nano",))
    assert caught.value.status == status


def test_a_prompt_that_is_too_long_is_refused_in_vllms_words() -> None:
    with pytest.raises(ScriptedRefusalError, match="maximum context length is 1000 tokens"):
        read(TEXT, prompt="x" * 4000)


@pytest.mark.parametrize("prompt", [None, [], 7])
def test_a_completion_needs_a_prompt(prompt: object) -> None:
    with pytest.raises(ScriptedRefusalError, match="prompt"):
        read(TEXT, prompt=prompt)


def test_options_that_the_plugin_refuses_are_refused() -> None:
    with pytest.raises(ScriptedRefusalError, match="mode must be one of"):
        read(messages=show(build_page(8, 8)), mm_processor_kwargs={"mode": "huge"})
