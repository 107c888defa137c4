"""What users of the OpenAI API do, against the real stack."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
import urllib.request
from typing import Any

import openai
import pytest

from e2e.conftest import Stack
from e2e.pages import build_page, encode, page_message

MODEL = "nano"
ALIAS = "deepseek-ai/DeepSeek-OCR"
PAGE = encode(build_page())
# bos, 8 rows of 8 tokens with a newline each, the separator, and the prompt, a token a character
PAGE_TOKENS = 1 + 8 * 9 + 1 + len("\nFree OCR.")
DOLLARS_PER_INPUT, DOLLARS_PER_OUTPUT = 0.03e-6, 0.10e-6


def cost_of(usage: Any) -> float:
    return usage.prompt_tokens * DOLLARS_PER_INPUT + usage.completion_tokens * DOLLARS_PER_OUTPUT


def check_usage(usage: Any, *, num_prompt: int, num_completion: int | None = None) -> None:
    assert usage.prompt_tokens == num_prompt
    assert num_completion is None or usage.completion_tokens == num_completion
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.estimated_cost == pytest.approx(cost_of(usage), abs=1e-9)


def test_a_page_is_answered_with_usage_and_cost(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=page_message(PAGE), max_tokens=16, extra_body={"ignore_eos": True}
    )
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason == "length"
    check_usage(answer.usage, num_prompt=PAGE_TOKENS, num_completion=16)


def test_an_answer_without_a_temperature_is_greedy(client: openai.OpenAI) -> None:
    texts = {
        client.chat.completions.create(model=MODEL, messages=page_message(PAGE), max_tokens=24)
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_every_format_is_read(client: openai.OpenAI, image_format: str) -> None:
    url = encode(build_page(300, 200), image_format)
    answer = client.chat.completions.create(model=MODEL, messages=page_message(url), max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PAGE_TOKENS


def test_several_images_in_one_message(client: openai.OpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": PAGE}}
    content = [part, part, {"type": "text", "text": "Free OCR."}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_tokens=1,
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PAGE_TOKENS + 73 + 1  # another image, and the newline after it


def test_a_chat_of_several_turns_with_a_system_message_and_no_image(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief. "},
            {"role": "user", "content": "Hi. "},
            {"role": "assistant", "content": "Hello. "},
            {"role": "user", "content": "Bye."},
        ],
        max_tokens=4,
        extra_body={"ignore_eos": True},
    )
    check_usage(answer.usage, num_prompt=1 + len("Be brief. Hi. Hello. Bye."), num_completion=4)


def test_messages_may_come_in_any_order_of_roles(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "assistant", "content": "Hello."},
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ],
        max_tokens=4,
        extra_body={"ignore_eos": True},
    )
    check_usage(answer.usage, num_prompt=1 + len("Hello.Be brief.a\nb3"), num_completion=4)


@pytest.mark.parametrize("model", [MODEL, ALIAS])
@pytest.mark.parametrize("prefix", ["/v1", "/v1/openai"])
def test_a_client_of_a_hosted_api_changes_only_the_host(stack: Stack, model: str, prefix: str) -> None:
    with openai.OpenAI(base_url=stack.url + prefix, api_key="unused", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
        )
        assert answer.model == MODEL  # what really ran
        assert model in [card.id for card in client.models.list()]
        assert client.models.retrieve(model).id == model


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.model == MODEL
    check_usage(answer.usage, num_prompt=1 + len("Once upon"), num_completion=5)


def read_events(stack: Stack, body: dict[str, Any]) -> list[str]:
    """The data of every server-sent event, as it was sent."""
    request = urllib.request.Request(
        f"{stack.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = answer.read().decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


def test_a_stream_gives_the_text_of_the_whole_answer_and_ends_in_done(stack: Stack, client: openai.OpenAI) -> None:
    body = {"model": MODEL, "messages": page_message(PAGE), "max_tokens": 20}
    whole = client.chat.completions.create(**body)  # type: ignore[call-overload]
    events = read_events(stack, {**body, "stream": True})
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert all(not chunk.get("usage") for chunk in chunks[:-1])
    assert chunks[-1]["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole.usage.completion_tokens
    assert {chunk["model"] for chunk in chunks} == {MODEL}


def test_a_stream_carries_usage_and_cost_in_its_last_chunk_when_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=ALIAS,
        messages=page_message(PAGE),
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(stream)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    check_usage(last.usage, num_prompt=PAGE_TOKENS, num_completion=9)


def test_chunks_come_as_they_are_made(client: openai.OpenAI) -> None:
    started = time.monotonic()
    first = None
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Go"}],
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in stream:
        first = first or time.monotonic() - started
    assert first is not None
    assert first < 0.5 * (time.monotonic() - started)


def test_concurrent_requests_run_in_one_batch(stack: Stack, client: openai.OpenAI) -> None:
    num_requests = 8
    most_running = 0.0
    finished = threading.Event()

    def watch() -> None:
        nonlocal most_running
        while not finished.is_set():
            most_running = max(most_running, stack.metric("vllm:num_requests_running"))

    def ask(number: int) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=page_message(encode(build_page(text=f"page {number}"))),
            max_tokens=200,
            extra_body={"ignore_eos": True},
        )

    with concurrent.futures.ThreadPoolExecutor(num_requests + 1) as pool:
        watching = pool.submit(watch)
        answers = list(pool.map(ask, range(num_requests)))
        finished.set()
        watching.result()
    assert [answer.usage.completion_tokens for answer in answers] == [200] * num_requests
    assert most_running == num_requests


def test_a_client_that_leaves_frees_the_engine(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Go"}],
            max_tokens=1900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 1.0
    while stack.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline


def test_models_health_and_ready(stack: Stack) -> None:
    def get(path: str) -> Any:
        with urllib.request.urlopen(stack.url + path, timeout=10) as answer:
            assert answer.status == 200
            return json.loads(answer.read())

    assert {card["id"]: card["root"] for card in get("/v1/models")["data"]} == {MODEL: MODEL, ALIAS: MODEL}
    assert get("/health") == {"status": "up"}
    assert get("/ready") == {"ready": True, "replicas": {MODEL: 1}}
