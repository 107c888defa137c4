"""What tenants can spend of their budgets, in front of an engine that generates as much as it is allowed to."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from support.router_stack import Engine, Exchange, answers, build_settings, chat_body, eventually, run_router

from serving.billing.records import RequestRecord
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.router.app import RouterApp
from serving.settings.billing import BillingSettings, BudgetSettings
from serving.settings.stack import Settings
from serving.settings.tenants import Tenant
from unit.router.access.test_auth import NOW
from unit.router.test_generation import recording

CONTEXT = 2048
"""Of the stack's replicas."""
PROMPT = 8
NANO = 10**9


async def generate_all(exchange: Exchange) -> None:
    """As vLLM does: to `max_tokens`, or to the end of the context."""
    body = orjson.loads(exchange.asked.body)
    given = body.get("max_completion_tokens") or body.get("max_tokens")
    longest = min(CONTEXT - PROMPT, given or CONTEXT)
    num_tokens = longest * max(body.get("n") or 1, body.get("best_of") or 1)
    usage = {"prompt_tokens": PROMPT, "completion_tokens": num_tokens, "total_tokens": PROMPT + num_tokens}
    choices = [{"message": {"content": "a"}, "finish_reason": "length"}]
    await answers(orjson.dumps({"choices": choices, "usage": usage}))(exchange)


def settings_for(folder: Path, dollars: str) -> tuple[Settings, dict[str, str]]:
    text, record = make_key("acme", created=NOW)
    file = folder / "keys.yaml"
    write_keys(file, KeysFile(tenants={"acme": Tenant(monthly_budget=Decimal(dollars))}, keys=(record,)))
    return build_settings(keys_file=file), {"authorization": f"Bearer {text}"}


def spent(records: list[RequestRecord]) -> Decimal:
    return Decimal(sum(record.cost_nanodollars for record in records)) / NANO


async def post(app: RouterApp, headers: dict[str, str], **fields: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        return await client.post("/v1/chat/completions", content=chat_body(**fields))


@pytest.mark.parametrize("fields", [{}, {"n": 4}, {"max_tokens": 2000}, {"max_tokens": 100, "n": 3}, {"best_of": 2}])
async def test_no_crowd_of_requests_spends_more_than_the_budget(tmp_path: Path, fields: dict[str, Any]) -> None:
    settings, headers = settings_for(tmp_path, "0.0005")
    async with recording(Engine(generate_all, max_num_seqs=64), settings=settings) as recorded:
        for _ in range(4):
            crowd = [post(recorded.router.app, headers, **fields) for _ in range(16)]
            statuses = {answer.status_code for answer in await asyncio.gather(*crowd)}
            assert statuses <= {200, 429}
        assert 0 < spent(recorded.records) <= Decimal("0.0005")


async def test_the_rest_of_a_budget_bounds_answers_that_their_clients_do_not(tmp_path: Path) -> None:
    settings, headers = settings_for(tmp_path, "0.00005")  # 500 tokens
    engine = Engine(generate_all)
    async with recording(engine, settings=settings) as recorded:
        first = await post(recorded.router.app, headers)
        assert first.status_code == 200
        assert 400 < orjson.loads(engine.asked[0].body)["max_tokens"] < 500
        last = await post(recorded.router.app, headers)
        assert (last.status_code, last.json()["error"]["code"]) == (429, "insufficient_quota")
        assert spent(recorded.records) <= Decimal("0.00005")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_that_the_rest_does_not_pay_for_is_refused_by_its_field(tmp_path: Path, field: str) -> None:
    settings, headers = settings_for(tmp_path, "0.00005")
    async with recording(Engine(generate_all), settings=settings) as recorded:
        refused = await post(recorded.router.app, headers, **{field: 1000})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (429, "insufficient_quota", field)
        assert "retry-after" not in refused.headers
        assert (await post(recorded.router.app, headers, **{field: 300})).status_code == 200


async def test_what_runs_is_waited_for(tmp_path: Path) -> None:
    """A request that fits but for what runs is told to come back: it is not the budget's end."""
    may_answer = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        await may_answer.wait()
        usage = {"prompt_tokens": PROMPT, "completion_tokens": 1, "total_tokens": PROMPT + 1}
        await answers(orjson.dumps({"choices": [{"message": {"content": "a"}}], "usage": usage}))(exchange)

    settings, headers = settings_for(tmp_path, "0.0003")
    engine = Engine(wait)
    async with recording(engine, settings=settings) as recorded:
        first = asyncio.create_task(post(recorded.router.app, headers))
        assert await eventually(lambda: bool(engine.asked))
        second = await post(recorded.router.app, headers)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(second.headers["retry-after"]) >= 1
        may_answer.set()
        assert (await first).status_code == 200
        assert (await post(recorded.router.app, headers)).status_code == 200


async def test_a_request_before_the_first_replica_reserves_when_it_has_one(tmp_path: Path) -> None:
    settings, headers = settings_for(tmp_path, "0.00005")
    admission = settings.router.admission.model_copy(update={"replica_wait_s": 5.0})
    settings = settings.model_copy(update={"router": settings.router.model_copy(update={"admission": admission})})
    engine = Engine(generate_all)
    async with recording(settings=settings) as recorded, engine:
        early = asyncio.create_task(post(recorded.router.app, headers))
        assert await eventually(lambda: recorded.router.num_queued == 1)
        recorded.router.records.append(engine.record)
        recorded.router.app.refresh()
        assert (await early).status_code == 200
        assert spent(recorded.records) <= Decimal("0.00005")


async def test_a_budget_that_nobody_can_look_up_is_not_opened_anew(tmp_path: Path) -> None:
    """The ledger is damaged, or its database away, when a router starts: the month may be spent already."""
    settings, headers = settings_for(tmp_path, "5")
    billing = BillingSettings(directory=tmp_path / "billing", flush_s=0.05, budget=BudgetSettings(refresh_s=0.1))
    (tmp_path / "billing").mkdir()
    ledger = tmp_path / "billing/ledger.db"
    ledger.write_bytes(b"this is no database, and long enough to be seen as none" * 100)
    settings = settings.model_copy(update={"billing": billing})
    async with (
        Engine(generate_all) as engine,
        run_router(engine.record, settings=settings, has_ledger=True) as router,
    ):
        refused = await router.client.post("/v1/chat/completions", content=chat_body(max_tokens=4), headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "budget_unknown")
        assert "retry-after" in refused.headers
        assert not engine.asked
        ledger.unlink()  # the operator begins a new one

        for _ in range(200):
            answer = await router.client.post("/v1/chat/completions", content=chat_body(max_tokens=4), headers=headers)
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.05)
        assert answer.status_code == 200
