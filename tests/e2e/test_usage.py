"""What the engine tells of each request, against what its own metrics have counted."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
import pytest

from e2e.conftest import Stack
from e2e.pages import build_page, encode, page_message

PAGE = page_message(encode(build_page()))
HELLO = [{"role": "user", "content": "Hello"}]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("chat/completions", {"messages": HELLO, "max_tokens": 7}),
    "stream": ("chat/completions", {"messages": HELLO, "max_tokens": 7, "stream": True}),
    "page": ("chat/completions", {"messages": PAGE, "max_tokens": 5}),
    "choices": ("chat/completions", {"messages": HELLO, "max_tokens": 5, "n": 3, "temperature": 1.0}),
    "prompts": ("completions", {"prompt": ["one", "two words"], "max_tokens": 5}),
    "left": ("chat/completions", {"messages": HELLO, "max_tokens": 500, "ignore_eos": True}),
    "left page": ("chat/completions", {"messages": PAGE, "max_tokens": 500, "ignore_eos": True, "stream": True}),
    "left choices": ("completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 500, "ignore_eos": True}),
    "refused": ("chat/completions", {"messages": HELLO, "max_tokens": -1}),
}


async def send(http: aiohttp.ClientSession, url: str, kind: str, request_id: str) -> dict[str, Any] | None:
    """The usage that the answer told; None for a client that left before its end."""
    path, body = KINDS[kind]
    headers = {"x-request-id": request_id}
    leaving_s = 1.5 if kind.startswith("left") else None
    try:
        async with asyncio.timeout(leaving_s):
            async with http.post(f"{url}/v1/{path}", json={"model": "nano", **body}, headers=headers) as answer:
                text = await answer.text()
    except TimeoutError:
        return None
    if kind == "stream":
        *frames, last, done = [frame.removeprefix("data: ") for frame in text.strip().split("\n\n")]
        assert done == "[DONE]"
        assert not any(orjson.loads(frame).get("usage") for frame in frames), "only the last frame tells"
        text = last
    found: dict[str, Any] = orjson.loads(text).get("usage") or {}
    return found


async def fetch(http: aiohttp.ClientSession, url: str, request_id: str) -> dict[str, Any]:
    """As soon as the engine has done with it."""
    async with asyncio.timeout(2):
        while True:
            async with http.get(f"{url}/usage/{request_id}") as answer:
                assert answer.status == 200, f"{request_id}: {await answer.text()}"
                found: dict[str, Any] = await answer.json()
            if found["is_finished"]:
                return found
            await asyncio.sleep(0.05)


async def test_every_request_is_told_as_the_engine_counted_it(stack: Stack) -> None:
    url = stack.engine_url
    before = {name: stack.metric(f"vllm:{name}_tokens_total") for name in ("generation", "prompt")}
    async with aiohttp.ClientSession() as http:
        ids = [(kind, f"{kind.replace(' ', '-')}_{number}") for number in range(3) for kind in KINDS]
        answers = await asyncio.gather(*(send(http, url, kind, name) for kind, name in ids))
        told = await asyncio.gather(*(fetch(http, url, name) for _, name in ids))
        async with http.get(f"{url}/usage") as answer:
            totals = await answer.json()
        async with http.get(f"{url}/usage/nobody") as answer:
            assert answer.status == 404
    for (kind, name), answered, usage in zip(ids, answers, told, strict=True):
        assert usage["request_id"] == name
        if answered:
            assert usage["completion_tokens"] == answered["completion_tokens"], kind
            assert usage["prompt_tokens"] == answered["prompt_tokens"], kind
            images = ((answered.get("prompt_tokens_details") or {}).get("multimodal_tokens") or {}).get("image", 0)
            assert usage["image_tokens"] == images, kind
        elif answered is None:
            assert usage["finish_reason"] in ("abort", ""), "empty when it had not begun yet"
        else:
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (0, 0)
    left = [usage["completion_tokens"] for (kind, _), usage in zip(ids, told, strict=True) if kind == "left"]
    assert any(left), "who left had used something"
    generated = stack.metric("vllm:generation_tokens_total") - before["generation"]
    assert sum(usage["completion_tokens"] for usage in told) == generated
    assert totals["completion_tokens"] == stack.metric("vllm:generation_tokens_total")
    # vLLM counts a prompt once for each of its answers.
    prompted = sum(usage["prompt_tokens"] * _answers(kind) for (kind, _), usage in zip(ids, told, strict=True))
    if all(usage["prompt_tokens"] for (kind, _), usage in zip(ids, told, strict=True) if kind == "left choices"):
        assert prompted == stack.metric("vllm:prompt_tokens_total") - before["prompt"]


def _answers(kind: str) -> int:
    return int(KINDS[kind][1].get("n", 1))


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_usage_is_only_read(stack: Stack, method: str) -> None:
    async with aiohttp.ClientSession() as http, http.request(method, f"{stack.engine_url}/usage/a") as answer:
        assert answer.status == 405
