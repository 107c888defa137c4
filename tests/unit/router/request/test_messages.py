"""Messages in the forms that clients write, and what the engine gets of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from support.request_pictures import encode_image, to_url

from serving.errors import ServingError
from serving.router.request.messages import DocumentPart
from serving.router.request.parsing import RoutedRequest, parse_request
from serving.settings.stack import ModelSettings, Settings

CHAT = "/v1/chat/completions"
SETTINGS = Settings(models={"nano": ModelSettings(checkpoint="nano")})
PICTURE = encode_image("PNG", 300, 200)
URL = to_url(PICTURE)
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
PDF = "data:application/pdf;base64,JVBERi0xLjc="


def parse(*messages: Any, images: Mapping[str, Any] | None = None, **fields: Any) -> RoutedRequest:
    """With the model's image settings, as its replicas report them."""
    body = json.dumps({"model": "nano", "messages": messages, **fields}).encode()
    return parse_request(CHAT, body, SETTINGS, lambda model: images or {})


def sent(*messages: Any) -> list[Any]:
    found: list[Any] = orjson.loads(parse(*messages).body)["messages"]
    return found


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (IMAGE, IMAGE),
        ({"type": "image_url", "image_url": URL}, IMAGE),
        ({"image_url": URL}, {"image_url": {"url": URL}}),
        ({"type": "image_url", "image_url": {"url": URL, "detail": None}}, IMAGE),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, IMAGE),
        ({"type": "input_image", "image_url": URL, "file_id": None}, IMAGE),
        ({"type": "file", "file": {"file_data": URL, "filename": "a.png"}}, IMAGE),
        ({"type": "input_file", "file_data": URL}, IMAGE),
        ({"type": "input_text", "text": "Hello"}, {"type": "text", "text": "Hello"}),
        ({"type": "output_text", "text": "Hello", "annotations": []}, {"type": "text", "text": "Hello"}),
        ({"type": "text", "text": None}, {"type": "text", "text": ""}),
        ({"type": "text", "text": ""}, {"type": "text", "text": ""}),
        ("Hello", {"type": "text", "text": "Hello"}),
    ],
)
def test_a_part_reaches_the_engine_in_its_own_form(part: Any, expected: dict[str, Any]) -> None:
    assert sent(user(part)) == [user(expected)]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "user"}, {"role": "user", "content": ""}),
        ({"role": "function", "name": "f", "content": "3"}, {"role": "tool", "name": "f", "content": "3"}),
        ({"role": "tool", "content": ["3"]}, {"role": "tool", "content": [{"type": "text", "text": "3"}]}),
    ],
)
def test_a_message_reaches_the_engine_in_its_own_form(message: Any, expected: dict[str, Any]) -> None:
    assert sent(message) == [expected]


@pytest.mark.parametrize(
    "written",
    [
        base64.encodebytes(PICTURE).decode(),
        base64.encodebytes(PICTURE).decode().replace("\n", "\r\n"),
        base64.b64encode(PICTURE).decode().rstrip("="),
        base64.b64encode(PICTURE).decode() + "\n",
        base64.urlsafe_b64encode(PICTURE).decode(),
        base64.urlsafe_b64encode(PICTURE).decode().rstrip("="),
    ],
    ids=["lines", "crlf", "no padding", "newline", "url-safe", "url-safe without padding"],
)
@pytest.mark.parametrize("num_more", [0, 1, 2])
def test_base64_may_be_written_in_any_of_its_ways(written: str, num_more: int) -> None:
    picture = PICTURE + bytes(range(250, 250 + num_more))  # every length of padding
    written = written if not num_more else base64.urlsafe_b64encode(picture).decode().rstrip("=")
    assert sent(user({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{written}"}})) == [
        user({"type": "image_url", "image_url": {"url": to_url(picture)}})
    ]


def test_a_long_image_without_padding_is_repaired_too() -> None:
    noise = PICTURE + bytes(100_001)
    assert len(noise) % 3
    url = to_url(noise)
    assert sent(user({"type": "image_url", "image_url": {"url": url.rstrip("=")}})) == [
        user({"type": "image_url", "image_url": {"url": url}})
    ]


@pytest.mark.parametrize("data", ["A", "AAAAA", "AAA*", "ÄÄÄÄ", "=", "====", "A=AA"])
def test_what_is_no_base64_is_still_refused(data: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(user({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}))
    assert (caught.value.http_status, caught.value.param) == (400, "messages[0].content[0].image_url")


@pytest.mark.parametrize(
    ("trained", "mode"), [((), "small"), (("tiny",), "default"), (("tiny", "small"), "small"), (("gundam",), "default")]
)
def test_a_detail_chooses_no_mode_that_the_model_was_not_trained_for(trained: tuple[str, ...], mode: str) -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    assert parse(user(part), images={"modes": trained}).image_options == {"mode": [mode]}


def test_of_a_model_with_one_mode_none_can_be_chosen() -> None:
    """The engine's own code for it knows neither modes nor details."""
    part = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    fixed = {"is_fixed": True}
    request = parse(user(part), images=fixed)
    assert request.image_options == {}
    assert "mm_processor_kwargs" not in orjson.loads(request.body)
    with pytest.raises(ServingError) as caught:
        parse(user(part), images=fixed, mm_processor_kwargs={"mode": "base"})
    assert (caught.value.http_status, caught.value.param) == (400, "mm_processor_kwargs")
    assert caught.value.body()["error"]["code"] == "mode_not_supported"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            {"type": "file", "file": {"file_data": PDF, "filename": "a.pdf"}},
            DocumentPart("messages[0].content[0].file.file_data", PDF, "a.pdf"),
        ),
        (
            {"type": "file", "file": {"file_data": "JVBERi0xLjc="}},
            DocumentPart("messages[0].content[0].file.file_data", PDF, None),
        ),
        ({"type": "input_file", "file_data": PDF}, DocumentPart("messages[0].content[0].file_data", PDF, None)),
        (
            {"type": "input_file", "file_url": "https://example.com/a.pdf"},
            DocumentPart("messages[0].content[0].file_url", "https://example.com/a.pdf", None),
        ),
    ],
)
def test_a_document_is_kept_for_the_ocr_service(part: Any, expected: DocumentPart) -> None:
    assert parse(user(part)).documents == (expected,)


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "file", "file": {"file_id": "file-1"}}, "file.file_id"),
        ({"type": "input_file", "file_id": "file-1"}, "file_id"),
        ({"type": "input_image", "file_id": "file-1"}, "file_id"),
        ({"type": "file", "file": {}}, "file.file_data"),
        ({"type": "file", "file": "a"}, "file"),
        ({"type": "file", "file": {"file_data": 3}}, "file.file_data"),
        ({"type": "file", "file": {"file_data": PDF, "filename": 3}}, "file.filename"),
        ({"type": "text", "text": "look", "image_url": {"url": URL}}, "image_url"),
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "image_url"),
        ({"type": "input_text", "text": 3}, "text"),
    ],
)
def test_what_a_part_lacks_is_named(part: Any, param: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(user(part))
    assert (caught.value.http_status, caught.value.param) == (400, f"messages[0].content[0].{param}")
