"""Who asks the service: told by a router, for everybody, however much one tenant asks of it."""

from __future__ import annotations

import asyncio

import pytest
from support.router_stack import Engine, Exchange, Script, answers, eventually

from serving.ocr.reading.router_client import Caller, Callers, Routers


def router(tenant: bytes, status: int = 200) -> Script:
    """Tells whose key it is, and never answers anything else."""

    async def script(exchange: Exchange) -> None:
        if exchange.asked.path == "/v1/tenant":
            await answers(tenant, status)(exchange)
        else:
            await asyncio.Event().wait()

    return script


async def test_quotes_of_one_tenant_do_not_keep_others_from_being_known() -> None:
    async with (
        Engine(router(b'{"id": "other", "key_id": "key-1"}')) as engine,
        Callers(Routers(engine.record.base_url)) as callers,
    ):
        quotes = [asyncio.create_task(callers.fetch_quote("sk-hostile", b"{}")) for _ in range(150)]
        assert await eventually(lambda: len(engine.asked) >= 100, 10)
        async with asyncio.timeout(5):
            assert (await callers.identify("Bearer sk-other")).owner == "other"
        for task in quotes:
            task.cancel()
        await asyncio.gather(*quotes, return_exceptions=True)


@pytest.mark.parametrize(
    ("told", "status", "owner", "is_one_of_many"),
    [
        (b'{"id": "acme", "key_id": "key-1"}', 200, "acme", True),
        (b'{"id": "anonymous", "key_id": null}', 200, "anonymous", False),
        (b"no", 404, "key-", False),
    ],
)
async def test_a_share_is_kept_for_others_where_the_router_tells_tenants_apart(
    told: bytes, status: int, owner: str, is_one_of_many: bool
) -> None:
    async with Engine(router(told, status)) as engine, Callers(Routers(engine.record.base_url)) as callers:
        for _ in range(2):  # asked, and remembered
            found = await callers.identify("Bearer sk-x")
            assert found == Caller(found.owner, "sk-x", is_one_of_many)
            assert found.owner.startswith(owner)
        assert len(engine.asked) == 1
