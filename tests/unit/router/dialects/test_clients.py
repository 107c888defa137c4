"""The official clients of OpenAI's Responses API and of Anthropic's, in front of an engine that speaks chats."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import openai
import orjson
import pydantic
import pytest
import pytest_asyncio
from support.request_pictures import encode_image, to_url
from support.router_stack import COST, MODEL, USAGE, Engine, RunningRouter, answers, run_router, streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

URL = to_url(encode_image("PNG"))
DATA = URL.partition(",")[2]


def answer(text: str, finish_reason: str = "stop", **choice: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason, **choice}]
    return orjson.dumps({"id": "c", "object": "chat.completion", "model": MODEL, "choices": choices, "usage": USAGE})


def chunk(text: str | None, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def whole_stream(finish_reason: str = "stop") -> list[bytes]:
    usage = b'data: {"choices":[],"usage":' + orjson.dumps(USAGE) + b"}\n\n"
    return [chunk("Gr\u00fc"), chunk("\u00dfe"), chunk(None, finish_reason), usage, b"data: [DONE]\n\n"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router() -> AsyncIterator[RunningRouter]:
    async with run_router() as router:
        yield router


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(router: RunningRouter) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1",
        api_key="unused",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claude(router: RunningRouter) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{router.port}",
        api_key="unused",
        max_retries=0,
        http_client=httpx2.AsyncClient(trust_env=False),
    ) as client:
        yield client


# The Responses API


async def test_a_response_has_its_text_usage_and_cost(router: RunningRouter, client: openai.AsyncOpenAI) -> None:
    async with Engine(answers(answer("Hello"))) as engine, router.fronting(engine.record):
        response = await client.responses.create(
            model=MODEL,
            instructions="Be brief.",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": URL, "detail": "auto"},
                        {"type": "input_text", "text": "Free OCR."},
                    ],
                }
            ],
            max_output_tokens=7,
            metadata={"a": "b"},
            store=False,
        )
        asked = orjson.loads(engine.asked[0].body)
    assert (response.output_text, response.status, response.model) == ("Hello", "completed", MODEL)
    assert (response.instructions, response.max_output_tokens, response.metadata) == ("Be brief.", 7, {"a": "b"})
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (1000, 500, 1500)
    assert response.usage.model_extra == {"estimated_cost": COST}
    assert engine.asked[0].path == "/v1/chat/completions"
    assert asked["max_completion_tokens"] == 7
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "Free OCR."}],
        },
    ]


async def test_an_answer_that_was_cut_is_incomplete(router: RunningRouter, client: openai.AsyncOpenAI) -> None:
    async with Engine(answers(answer("Hel", "length"))) as engine, router.fronting(engine.record):
        response = await client.responses.create(model=MODEL, input="Hello")
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_streamed_response_has_the_documented_events(router: RunningRouter, client: openai.AsyncOpenAI) -> None:
    async with Engine(streams(*whole_stream())) as engine, router.fronting(engine.record):
        events = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Gr\u00fc\u00dfe"
    assert last.response.usage is not None
    assert last.response.usage.model_extra == {"estimated_cost": COST}


async def test_the_clients_own_stream_and_parser_work(router: RunningRouter, client: openai.AsyncOpenAI) -> None:
    class Page(pydantic.BaseModel):
        title: str

    async with (
        Engine(streams(*whole_stream("length"))) as engine,
        router.fronting(engine.record),
        client.responses.stream(model=MODEL, input="Hi") as stream,
    ):
        kinds = [event.type async for event in stream]
    assert kinds[-1] == "response.incomplete"
    async with Engine(answers(answer('{"title": "A"}'))) as engine, router.fronting(engine.record):
        parsed = await client.responses.parse(model=MODEL, input="Hi", text_format=Page)
        assert orjson.loads(engine.asked[0].body)["response_format"]["json_schema"]["name"] == "Page"
    assert parsed.output_parsed == Page(title="A")


async def test_earlier_items_may_be_sent_back(router: RunningRouter, client: openai.AsyncOpenAI) -> None:
    async with Engine(answers(answer("Hello"))) as engine, router.fronting(engine.record):
        first = await client.responses.create(model=MODEL, input="Hi")
        items: list[Any] = [
            {"role": "user", "content": "Hi"},
            {"type": "reasoning", "id": "r", "summary": []},
            *(item.to_dict() for item in first.output),
            {"role": "user", "content": "Bye"},
        ]
        await client.responses.create(model=MODEL, input=items)
        messages = orjson.loads(engine.asked[1].body)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == [{"type": "text", "text": "Hello"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"input": [{"role": "root", "content": "a"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "smell"}]}], "instructions": "a"},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"$ref": "#"}}}}, "text.format.schema"),
        ({"text": {"format": 3}}, "text.format"),
    ],
)
async def test_a_refusal_names_the_clients_own_field(fields: dict[str, Any], param: str, router: RunningRouter) -> None:
    async with router.fronting():
        body = {"model": MODEL, "input": "Hi", **fields}
        response = await router.client.post("/v1/responses", content=orjson.dumps(body))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_stream_that_fails_says_so(router: RunningRouter, client: openai.AsyncOpenAI) -> None:
    error = b'data: {"error":{"message":"x","type":"InternalServerError","code":500}}\n\n'
    async with Engine(streams(chunk("Hel"), error, b"data: [DONE]\n\n")) as engine, router.fronting(engine.record):
        with pytest.raises(openai.APIError, match="failed"):
            _ = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]


# The Messages API


async def test_a_message_has_its_text_usage_and_cost(router: RunningRouter, claude: anthropic.AsyncAnthropic) -> None:
    async with Engine(answers(answer("Hello"))) as engine, router.fronting(engine.record):
        message = await claude.messages.create(
            model=MODEL,
            max_tokens=9,
            system="Be brief.",
            stop_sequences=["END"],
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
                        {"type": "text", "text": "Free OCR."},
                    ],
                }
            ],
        )
        asked = orjson.loads(engine.asked[0].body)
    assert message.content[0].type == "text"
    assert (message.content[0].text, message.stop_reason, message.model) == ("Hello", "end_turn", MODEL)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (1000, 500)
    assert message.usage.model_extra == {"estimated_cost": COST}
    assert (asked["max_tokens"], asked["stop"]) == (9, ["END"])
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["messages"][1]["content"][0] == {"type": "image_url", "image_url": {"url": URL}}


@pytest.mark.parametrize(
    ("choice", "reason", "sequence"),
    [
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"finish_reason": "stop", "stop_reason": "END"}, "stop_sequence", "END"),
        ({"finish_reason": "stop", "stop_reason": 1}, "end_turn", None),
    ],
)
async def test_a_message_says_why_it_ends(
    choice: dict[str, Any],
    reason: str,
    sequence: str | None,
    router: RunningRouter,
    claude: anthropic.AsyncAnthropic,
) -> None:
    async with Engine(answers(answer("Hello", **choice))) as engine, router.fronting(engine.record):
        message = await claude.messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


async def test_a_streamed_message_adds_up(router: RunningRouter, claude: anthropic.AsyncAnthropic) -> None:
    async with (
        Engine(streams(*whole_stream())) as engine,
        router.fronting(engine.record),
        claude.messages.stream(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "Hi"}]) as stream,
    ):
        text = "".join([part async for part in stream.text_stream])
        message = await stream.get_final_message()
    assert text == "Gr\u00fc\u00dfe"
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 1000, 500)


async def test_a_refusal_has_anthropics_shape(router: RunningRouter, claude: anthropic.AsyncAnthropic) -> None:
    async with router.fronting():
        with pytest.raises(anthropic.BadRequestError) as caught:
            await claude.messages.create(
                model=MODEL,
                max_tokens=9,
                messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}],
            )
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
        assert body["error"]["param"] == "messages[0].content[0].source"
        with pytest.raises(anthropic.NotFoundError):
            await claude.messages.create(model="gpt-9", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
        refused = await router.client.post("/v1/messages", content=b'{"model":"nano","messages":[]}')
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
