from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import pytest_asyncio
from support.request_pictures import encode_image, image_part, to_url
from support.router_stack import ALIAS, MODEL, Engine, RunningRouter, answers, run_router

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOUND = b'{"count":2,"max_model_len":8192,"tokens":[1,2]}'
USER = {"role": "user", "content": "Hi"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router() -> AsyncIterator[RunningRouter]:
    async with run_router() as router:
        yield router


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tokenize", {"prompt": "Hi"}),
        ("/v1/tokenize", {"prompt": ""}),
        ("/tokenize", {"messages": [USER], "add_generation_prompt": False}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/detokenize", {"tokens": []}),
    ],
)
@pytest.mark.parametrize("model", [MODEL, ALIAS])
async def test_a_replica_answers(path: str, fields: dict[str, Any], model: str, router: RunningRouter) -> None:
    async with Engine(answers(FOUND)) as engine, router.fronting(engine.record):
        body = {"model": model, **fields}
        response = await router.client.post(path, content=orjson.dumps({**body, "chat_template_kwargs": {}}))
        assert (response.status_code, response.content) == (200, FOUND)
        assert response.headers["x-ignored-parameters"] == "chat_template_kwargs"
        assert [(asked.path, asked.body) for asked in engine.asked] == [(path.removeprefix("/v1"), orjson.dumps(body))]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": 3}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [image_part(to_url(encode_image("PNG")))]}]},
            "messages",
        ),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
async def test_what_cannot_be_answered_is_refused(
    path: str, fields: dict[str, Any], param: str, router: RunningRouter
) -> None:
    async with Engine(answers(FOUND)) as engine, router.fronting(engine.record):
        response = await router.client.post(path, content=orjson.dumps({"model": MODEL, **fields}))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert engine.asked == []


async def test_without_a_replica_there_is_no_answer(router: RunningRouter) -> None:
    async with router.fronting():
        response = await router.client.post("/tokenize", content=orjson.dumps({"model": MODEL, "prompt": "Hi"}))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_replica")
        assert (await router.client.get("/tokenize")).status_code == 405
