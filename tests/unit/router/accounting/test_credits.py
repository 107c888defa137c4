"""What a page was charged before is taken off, when a service of the stack says so, and nobody else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from support.router_stack import (
    Engine,
    Script,
    answers,
    build_settings,
    chat_body,
    eventually,
    streams,
    streams_and_waits,
)

from serving.billing.credits import CREDIT_HEADER, CreditSigner
from serving.billing.records import Outcome
from serving.settings.ocr import OcrSettings
from serving.settings.stack import Settings
from unit.router.test_generation import ANSWER, DONE, LAST, TEXT, USAGE_FRAME, recording, telling

SIGNER = CreditSigner(b"shared")
PRICE = 80_000
"""Of what the engine counts for a whole answer."""
SO_FAR = 13_000
"""Of what it tells of one that was broken off."""


def settings(**ocr: Any) -> Settings:
    return build_settings().model_copy(update={"ocr": OcrSettings(**{"secret": SecretStr("shared"), **ocr})})


def signed(nanodollars: int, request_id: str = "job-1-p1-t1", signer: CreditSigner = SIGNER) -> dict[str, str]:
    return {"x-request-id": request_id, CREDIT_HEADER: signer.sign(request_id, nanodollars)}


@pytest.mark.parametrize(("credit", "cost"), [(1, PRICE - 1), (PRICE - 1, 1), (PRICE, 0), (3 * PRICE, 0)])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_credit_is_taken_off_as_far_as_it_goes(credit: int, cost: int, is_stream: bool) -> None:
    script: Script = streams(TEXT, LAST, USAGE_FRAME, DONE) if is_stream else answers(orjson.dumps(ANSWER))
    async with recording(Engine(script), settings=settings()) as recorded:
        fields = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
        answer = await recorded.router.client.post(
            "/v1/chat/completions", content=chat_body(**fields), headers=signed(credit)
        )
        record = await recorded.only()
    assert (record.cost_nanodollars, record.credit_nanodollars) == (cost, PRICE - cost)
    told = answer.text.split("data: ")[-2] if is_stream else answer.text
    usage = orjson.loads(told)["usage"]
    assert (usage["estimated_cost"], usage["credited_cost"]) == (cost / 10**9, (PRICE - cost) / 10**9)


@pytest.mark.parametrize(
    "headers",
    [
        signed(500, signer=CreditSigner(b"guessed")),
        {**signed(500), "x-request-id": "job-1-p2-t1"},
        {CREDIT_HEADER: signed(500)[CREDIT_HEADER]},
        {CREDIT_HEADER: "500"},
        {CREDIT_HEADER: b"\xff"},
    ],
)
async def test_nobody_else_gives_credit(headers: dict[str, Any]) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=settings()) as recorded:
        answer = await recorded.router.client.post("/v1/chat/completions", content=chat_body(), headers=headers)
        record = await recorded.only()
    assert (record.cost_nanodollars, record.credit_nanodollars) == (PRICE, 0)
    assert "credited_cost" not in answer.json()["usage"]


async def test_the_secret_may_be_in_the_services_file(tmp_path: Path) -> None:
    router = settings(secret=None, directory=tmp_path)
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=router) as recorded:
        for cost in (PRICE, 0):
            await recorded.router.client.post("/v1/chat/completions", content=chat_body(), headers=signed(PRICE))
            assert await eventually(lambda: bool(recorded.records))
            assert recorded.records.pop().cost_nanodollars == cost
            (tmp_path / "secret").write_bytes(b"shared")


async def test_a_request_that_is_broken_off_again_costs_the_rest() -> None:
    left = asyncio.Event()
    engine = Engine(telling(streams_and_waits(left, TEXT)), answers_usage=True)
    async with recording(engine, settings=settings()) as recorded:
        body = chat_body(stream=True)
        client = recorded.router.client
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=signed(3_000)) as answer:
            await anext(answer.aiter_bytes())
        record = await recorded.only()
    assert record.outcome is Outcome.ABORTED
    assert (record.cost_nanodollars, record.credit_nanodollars) == (SO_FAR - 3_000, 3_000)
