from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.request_pictures import encode_image, image_part, png_header, to_url

from serving.errors import ImageTooLargeError, InternalError, InvalidRequestError, NoReplicaError, ServingError
from serving.router.request.parsing import RoutedRequest, explain_refusal, parse_request
from serving.settings.router import LimitSettings, RemoteImageSettings, RouterSettings
from serving.settings.stack import ModelSettings, Settings

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LIMITS = LimitSettings(max_images=2, max_messages=3, max_choices=4)
SETTINGS = Settings(
    models={"nano": ModelSettings(checkpoint="nano", aliases=("deepseek-ai/DeepSeek-OCR",))},
    router=RouterSettings(limits=LIMITS),
)
IMAGE = image_part(to_url(encode_image("PNG")))
USER = {"role": "user", "content": "Hello"}


def build_body(path: str = CHAT, **fields: Any) -> bytes:
    content: dict[str, Any] = {"messages": [USER]} if path == CHAT else {"prompt": "Once"}
    return json.dumps({"model": "nano", **content, **fields}).encode()


def parse(path: str = CHAT, **fields: Any) -> RoutedRequest:
    return parse_request(path, build_body(path, **fields), SETTINGS)


def page(width: int, height: int, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": to_url(png_header(width, height)), **more}}


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def refusal(path: str, body: bytes) -> tuple[int, str | None, str | None]:
    with pytest.raises(ServingError) as caught:
        parse_request(path, body, SETTINGS)
    shown = caught.value.body()["error"]
    assert shown["type"] == "invalid_request_error"
    return caught.value.http_status, shown["param"], shown["code"]


def test_the_body_goes_on_as_it_came() -> None:
    body = b' {"model" : "nano","messages":[{"role":"user","content":"\\u00e9"}]}\n'
    request = parse_request(CHAT, body, SETTINGS)
    assert request == RoutedRequest(CHAT, "nano", body, is_stream=False, wants_stream_usage=False, num_text_chars=1)


def test_an_alias_leads_to_the_model_behind_it() -> None:
    assert parse(model="deepseek-ai/DeepSeek-OCR").model == "nano"


@pytest.mark.parametrize(
    ("fields", "is_stream", "wants_stream_usage"),
    [
        ({}, False, False),
        ({"stream": None, "stream_options": None}, False, False),
        ({"stream": False}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
    ],
)
def test_a_stream_is_told_from_a_whole_answer(
    fields: dict[str, Any], is_stream: bool, wants_stream_usage: bool
) -> None:
    request = parse(**fields)
    assert (request.is_stream, request.wants_stream_usage) == (is_stream, wants_stream_usage)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{'model': 'nano'}", b"[1]", b'"nano"', b"null", b"3", b"\xff\xfe", b"[" * 100_000]
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_is_no_json_object_is_refused(path: str, body: bytes) -> None:
    assert refusal(path, body) == (400, None, "invalid_json")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": None}, (400, "model", None)),
        ({"model": ""}, (400, "model", None)),
        ({"model": 3}, (400, "model", None)),
        ({"model": ["nano"]}, (400, "model", None)),
        ({"model": "gpt-9"}, (404, "model", "model_not_found")),
        ({"model": "Nano"}, (404, "model", "model_not_found")),
        ({"stream": "yes"}, (400, "stream", None)),
        ({"stream": 1}, (400, "stream", None)),
        ({"stream_options": True}, (400, "stream_options", None)),
        ({"stream_options": []}, (400, "stream_options", None)),
        ({"n": 5}, (400, "n", None)),
        ({"best_of": 5}, (400, "best_of", None)),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_every_request_needs_is_checked(
    path: str, fields: dict[str, Any], expected: tuple[int, str | None, str | None]
) -> None:
    assert refusal(path, build_body(path, **fields)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": [USER] * 4}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [USER, None]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"messages": [USER, {"content": [IMAGE, 3]}]}, "messages[1].content[1]"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"content": [image_part(3)]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"content": [IMAGE] * 3}]}, "messages[0].content[2].image_url"),
        ({"messages": [{"role": "user", "content": [IMAGE]}] * 3}, "messages[2].content[0].image_url"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "root", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "Hello", "name": 3}]}, "messages[0].name"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_where_they_stand(fields: dict[str, Any], expected: str) -> None:
    body = orjson.dumps({"model": "nano", **fields})
    assert refusal(CHAT, body) == (400, expected, None)


BAD_IMAGE = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    "part",
    [
        image_part(BAD_IMAGE),
        {"type": "image_url", "image_url": BAD_IMAGE},
        {"image_url": {"url": BAD_IMAGE}},
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_no_spelling_of_an_image_part_gets_past_the_check(part: dict[str, Any], role: str) -> None:
    body = orjson.dumps({"model": "nano", "messages": [USER, {"role": role, "content": [{"type": "text"}, part]}]})
    assert refusal(CHAT, body) == (400, "messages[1].content[1].image_url", "invalid_image")


@pytest.mark.parametrize(
    "part",
    [
        {"type": None, "image_url": BAD_IMAGE},
        {"type": ["image_url"], "image_url": BAD_IMAGE},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1/v.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/a.mp3"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "smell"},
        {"text": "Hello"},
        {},
    ],
)
def test_parts_that_are_neither_text_nor_image_are_refused(part: dict[str, Any]) -> None:
    assert refusal(CHAT, build_body(messages=user(part))) == (400, "messages[0].content[0].type", None)


@pytest.mark.parametrize("key", ["uuid", "image_pil", "image_embeds", "video_url", "audio_url", "input_audio", "file"])
@pytest.mark.parametrize("part", [IMAGE, {"type": "text", "text": "Hello"}])
def test_a_part_cannot_carry_more_than_it_says(part: dict[str, Any], key: str) -> None:
    body = build_body(messages=user({**part, key: "http://127.0.0.1/"}))
    assert refusal(CHAT, body) == (400, f"messages[0].content[0].{key}", None)


def test_a_giant_among_good_images_is_found() -> None:
    giant = image_part(to_url(png_header(60_000, 60_000)))
    with pytest.raises(ImageTooLargeError) as caught:
        parse(messages=[{"role": "user", "content": [IMAGE, giant]}])
    assert caught.value.param == "messages[0].content[1].image_url"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Free OCR."}]}],
        [{"role": "user", "content": [IMAGE, IMAGE]}],
        [{"role": "user", "content": []}],
        [{"role": "user"}],
        [USER] * 3,
    ],
)
def test_chats_within_the_limits_pass(messages: list[Any]) -> None:
    assert parse(messages=messages).model == "nano"


def test_the_sizes_of_images_are_told_in_their_order() -> None:
    text = {"type": "text", "text": "Free OCR."}
    assert parse(messages=user(page(30, 20), text, page(7, 9))).image_sizes == ((30, 20), (7, 9))
    assert parse().image_sizes == ()


def test_the_size_of_a_remote_image_is_not_known() -> None:
    router = RouterSettings(remote_images=RemoteImageSettings(enabled=True, hosts=("*",)))
    body = orjson.dumps({"model": "nano", "messages": user(image_part("https://example.com/a.png"), page(3, 4))})
    request = parse_request(CHAT, body, Settings(models=SETTINGS.models, router=router))
    assert request.image_sizes == (None, (3, 4))


@pytest.mark.parametrize(
    ("details", "modes"),
    [
        (("low", None), ["small", "default"]),
        (("auto", "high"), ["auto", "gundam"]),
        ((None, "low"), ["default", "small"]),
    ],
)
def test_openai_detail_becomes_a_mode_for_the_engine(details: tuple[str | None, ...], modes: list[str]) -> None:
    messages = user(*(page(30, 20, detail=detail) for detail in details))
    sent = user(*(page(30, 20) for _ in details))
    request = parse(messages=messages, mm_processor_kwargs={"max_tiles": 4}, seed=3)
    options = {"max_tiles": 4, "mode": modes}
    assert request.image_options == options
    expected = {"model": "nano", "messages": sent, "mm_processor_kwargs": options, "seed": 3}
    expected["skip_special_tokens"] = False
    assert orjson.loads(request.body) == expected


def test_a_mode_goes_before_details() -> None:
    fields: dict[str, Any] = {"messages": user(page(30, 20, detail="low")), "mm_processor_kwargs": {"mode": "base"}}
    fields["skip_special_tokens"] = True
    request = parse(**fields)
    assert request.image_options == {"mode": "base"}
    assert orjson.loads(request.body) == {**orjson.loads(build_body(**fields)), "messages": user(page(30, 20))}


@pytest.mark.parametrize("detail", ["medium", "", 3, [], {}, True])
def test_a_detail_that_openai_does_not_know_is_refused(detail: Any) -> None:
    body = orjson.dumps({"model": "nano", "messages": user(page(30, 20, detail=detail))})
    assert refusal(CHAT, body) == (400, "messages[0].content[0].image_url.detail", None)


@pytest.mark.parametrize("options", [3, "base", [], True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_image_options_are_an_object(path: str, options: Any) -> None:
    assert refusal(path, build_body(path, mm_processor_kwargs=options)) == (400, "mm_processor_kwargs", None)


@pytest.mark.parametrize(
    ("path", "fields", "num_choices"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": None}, 1),
        (CHAT, {"n": 4}, 4),
        (TEXT, {"n": 1, "best_of": 4}, 4),
        (TEXT, {"prompt": ["a", "b"]}, 2),
        (TEXT, {"prompt": ["a", "b"], "n": 2}, 4),
        (TEXT, {"prompt": [[1, 2], [3]]}, 2),
        (TEXT, {"prompt": [1, 2, 3]}, 1),
    ],
)
def test_choices_are_counted(path: str, fields: dict[str, Any], num_choices: int) -> None:
    assert parse(path, **fields).num_choices == num_choices


@pytest.mark.parametrize(
    ("path", "fields", "max_tokens"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (TEXT, {}, 16),
        (TEXT, {"max_tokens": None}, 16),
        (TEXT, {"max_tokens": 3}, 3),
    ],
)
def test_the_longest_answer_is_told(path: str, fields: dict[str, Any], max_tokens: int | None) -> None:
    assert parse(path, **fields).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("path", "fields", "num_chars"),
    [
        (CHAT, {"messages": [USER, {"role": "assistant", "content": None}, USER]}, 10),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Free OCR."}]}]}, 9),
        (CHAT, {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]}, 3),
        (TEXT, {"prompt": "Once"}, 4),
        (TEXT, {"prompt": ["Once", "upon"]}, 8),
        (TEXT, {"prompt": [1, 2]}, 6),
        (TEXT, {"prompt": [[1, 2], [3]]}, 9),
    ],
)
def test_the_prompts_text_is_measured(path: str, fields: dict[str, Any], num_chars: int) -> None:
    assert parse(path, **fields).num_text_chars == num_chars


@pytest.mark.parametrize("value", [1e6, "1000000", 10**30, 0, -1, True, 1.0])
@pytest.mark.parametrize("key", ["n", "best_of"])
def test_no_spelling_of_a_number_gets_past_the_limit_of_choices(key: str, value: Any) -> None:
    body = json.dumps({"model": "nano", "messages": [USER], key: value}).encode()
    assert refusal(CHAT, body) == (400, key, None)


def test_completions_need_no_messages() -> None:
    request = parse_request(TEXT, b'{"model": "nano", "prompt": "Once"}', SETTINGS)
    assert (request.path, request.model) == (TEXT, "nano")


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], 3, {}, [True], [1.5], [-1], [2**31], ["a", 1], [1, "a"], [[1], "a"], [None]]
)
def test_a_prompt_that_is_none_is_refused(prompt: Any) -> None:
    assert refusal(TEXT, build_body(TEXT, prompt=prompt)) == (400, "prompt", None)


def test_prompts_times_choices_are_bounded() -> None:
    assert refusal(TEXT, build_body(TEXT, prompt=["a", "b", "c"], n=2)) == (400, "prompt", None)


def test_logprobs_of_a_prompt_cannot_be_had() -> None:
    assert refusal(TEXT, build_body(TEXT, echo=True, logprobs=1)) == (400, "echo", None)
    assert parse(TEXT, echo=True).path == TEXT


def test_a_long_model_name_is_not_sent_back_whole() -> None:
    with pytest.raises(ServingError) as caught:
        parse(model="x" * 10_000)
    assert len(caught.value.message) < 250


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("nano")
    | st.just("data:;base64,"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "url", "image_url", "content", "role", "include_usage"]), inner)
    ),
    max_leaves=12,
)
FIELDS = ("messages", "prompt", "stream", "stream_options", "n", "best_of", "model")


@given(
    st.sampled_from([CHAT, TEXT]),
    JSON
    | st.fixed_dictionaries({"model": st.just("nano")}, optional=dict.fromkeys(FIELDS[:-1], JSON))
    | st.fixed_dictionaries({"model": st.just("nano"), "messages": st.lists(st.fixed_dictionaries({"content": JSON}))})
    | st.dictionaries(st.sampled_from(FIELDS), JSON),
)
def test_arbitrary_json_raises_nothing_but_serving_errors(path: str, payload: Any) -> None:
    with contextlib.suppress(ServingError):
        parse_request(path, json.dumps(payload).encode(), SETTINGS)


@given(st.sampled_from([CHAT, TEXT]), st.binary())
def test_arbitrary_bytes_raise_nothing_but_serving_errors(path: str, body: bytes) -> None:
    with pytest.raises(ServingError):
        parse_request(path, body, SETTINGS)


@pytest.mark.parametrize("prompt", [["a"] * 5, [[1, 2]] * 5])
def test_the_prompts_of_a_completion_are_bounded(prompt: list[Any]) -> None:
    assert refusal(TEXT, orjson.dumps({"model": "nano", "prompt": prompt})) == (400, "prompt", None)


def test_a_prompt_of_token_ids_is_one_prompt() -> None:
    assert parse(TEXT, prompt=list(range(100))).path == TEXT


@pytest.mark.parametrize(
    ("fields", "is_constrained"),
    [
        ({}, False),
        ({"response_format": None, "structured_outputs": None, "tool_choice": None}, False),
        ({"response_format": {"type": "text"}, "tool_choice": "none"}, False),
        ({"tool_choice": "auto"}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "a"}}, True),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "read"}}}, True),
    ],
)
def test_a_failure_under_a_grammar_is_the_grammars(fields: dict[str, Any], is_constrained: bool) -> None:
    request = parse(**fields)
    assert request.is_constrained is is_constrained
    failure = InternalError("The model failed.")
    assert isinstance(explain_refusal(request, failure), InvalidRequestError) is is_constrained
    for other in (InternalError("The model failed.", 501), NoReplicaError("gone")):
        assert explain_refusal(request, other) is other


# Special tokens


@pytest.mark.parametrize("detail", [{}, {"detail": "low"}])
def test_a_page_keeps_its_special_tokens_unless_its_client_says_otherwise(detail: dict[str, str]) -> None:
    messages = user(page(30, 20, **detail))

    def skips(**fields: Any) -> Any:
        return orjson.loads(parse(messages=messages, **fields).body).get("skip_special_tokens")

    assert skips() is False
    assert skips(skip_special_tokens=None) is False
    assert skips(skip_special_tokens=True) is True
    assert skips(skip_special_tokens=False) is False
    assert skips(ignore_eos=True) is None, "its text would hold the ends of sentences"
    assert b"skip_special_tokens" not in parse().body
