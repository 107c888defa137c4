"""What the stack says to requests that cannot be served, and that it goes on after them."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.conftest import Stack
from e2e.pages import bomb, build_page, data_url, encode, page_message

MODEL = "nano"
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def send(stack: Stack, body: bytes, path: str = CHAT, method: str = "POST") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(stack.url + path, body, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def chat(**changes: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 2, **changes}).encode()


def with_image(url: Any) -> bytes:
    return chat(messages=page_message(url))


@pytest.fixture(autouse=True)
def _the_next_request_is_served(stack: Stack) -> Iterator[None]:
    yield
    status, answer = send(stack, chat())
    assert status == 200, answer


PNG = base64.b64decode(encode(build_page()).partition(",")[2])
PART = "messages[0].content[0].image_url"

CASES: dict[str, tuple[bytes, int, dict[str, Any]]] = {
    "malformed JSON": (b'{"model": "nano", ', 400, {"code": "invalid_json"}),
    "JSON that is no object": (b"[1, 2]", 400, {"code": "invalid_json"}),
    "empty body": (b"", 400, {"code": "invalid_json"}),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400, {"code": "invalid_json"}),
    "no model": (json.dumps({"messages": HELLO}).encode(), 400, {"param": "model"}),
    "unknown model": (chat(model="gpt-9"), 404, {"code": "model_not_found", "param": "model"}),
    "model of the wrong type": (chat(model=7), 400, {"param": "model"}),
    "no messages": (chat(messages=[]), 400, {"param": "messages"}),
    "messages missing": (chat(messages=None), 400, {"param": "messages"}),
    "messages of the wrong type": (chat(messages="Hello"), 400, {"param": "messages"}),
    "message of the wrong type": (chat(messages=["Hello"]), 400, {"param": "messages[0]"}),
    "message without a role": (chat(messages=[{"content": "Hello"}]), 400, {}),
    "part of an unknown type": (chat(messages=[{"role": "user", "content": [{"type": "smell"}]}]), 400, {}),
    "image that is none": (with_image(data_url(b"not an image at all")), 400, {"code": "invalid_image", "param": PART}),
    "image cut short": (with_image(data_url(PNG[: len(PNG) // 2])), 400, {}),
    "image that is not base64": (with_image("data:image/png;base64,%%%"), 400, {"code": "invalid_image"}),
    "data URL without data": (with_image("data:image/png;base64,"), 400, {"code": "invalid_image"}),
    "image over the pixel limit": (
        with_image(encode(build_page(2001, 2000))),
        400,
        {"code": "image_too_large", "param": PART},
    ),
    "bomb of 50,000 x 50,000": (with_image(data_url(bomb(50_000, 50_000))), 400, {"code": "image_too_large"}),
    "bomb just below Pillow's own limit": (
        with_image(data_url(bomb(9_000, 9_000))),
        400,
        {"code": "image_too_large"},
    ),
    "SVG": (with_image(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 400, {"code": "invalid_image"}),
    "remote image": (with_image("https://example.com/page.png"), 400, {"code": "invalid_image"}),
    "local file": (with_image("file:///etc/passwd"), 400, {"code": "invalid_image"}),
    "image URL of the wrong type": (with_image(12), 400, {"param": PART}),
    "prompt over the context length": (
        chat(messages=[{"role": "user", "content": "x" * 3000}]),
        400,
        {"code": "context_length_exceeded"},
    ),
    "answer over the context length": (chat(max_tokens=5000), 400, {"code": "context_length_exceeded"}),
    "negative temperature": (chat(temperature=-1), 400, {"param": "temperature"}),
    "temperature of the wrong type": (chat(temperature="hot"), 400, {}),
    "top_p out of range": (chat(top_p=2), 400, {"param": "top_p"}),
    "negative max_tokens": (chat(max_tokens=-1), 400, {}),
    "max_tokens of the wrong type": (chat(max_tokens="many"), 400, {}),
    "n out of range": (chat(n=10_000), 400, {"param": "n"}),
    "n of nothing": (chat(n=0), 400, {}),
    "stream of the wrong type": (chat(stream="yes"), 400, {"param": "stream"}),
    "stream_options of the wrong type": (chat(stream=True, stream_options=[1]), 400, {"param": "stream_options"}),
    "too many logprobs": (chat(logprobs=True, top_logprobs=100_000), 400, {}),
    "unknown processor argument": (
        chat(messages=page_message(encode(build_page())), mm_processor_kwargs={"size": 3}),
        400,
        {"param": "mm_processor_kwargs"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_is_told_what_is_wrong(stack: Stack, name: str) -> None:
    body, status, expected = CASES[name]
    found_status, answer = send(stack, body)
    assert (found_status, set(answer)) == (status, {"error"}), answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert {key: error[key] for key in expected} == expected


def test_a_body_over_the_limit(stack: Stack) -> None:
    status, answer = send(stack, chat(messages=[{"role": "user", "content": "x" * 8_000_001}]))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_an_unknown_path(stack: Stack) -> None:
    status, answer = send(stack, chat(), path="/v1/embeddings")
    assert (status, answer["error"]["code"]) == (404, "not_found")


def test_the_wrong_method(stack: Stack) -> None:
    status, answer = send(stack, chat(), path="/v1/models")
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")


def test_completions_are_checked_too(stack: Stack) -> None:
    status, answer = send(stack, json.dumps({"model": "gpt-9", "prompt": "x"}).encode(), path="/v1/completions")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
