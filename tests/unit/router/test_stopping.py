"""A router of a stack that goes down finishes what runs, pages of open documents included, and begins nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from support.router_stack import Engine, RunningRouter, answers, build_settings, chat_body, run_router

from serving.billing.credits import CREDIT_HEADER, CreditSigner
from serving.cluster.directory import ServiceRecord, Snapshot
from serving.router.app import METHODS
from serving.router.lookups.routes import QUOTE
from serving.settings.ocr import OcrSettings
from unit.router.test_generation import ANSWER, DONE, LAST, TEXT


def stop(router: RunningRouter) -> None:
    """What the directory tells when `serving up` begins to stop."""
    router.replicas.is_stopping = True
    router.app.refresh()


def settings() -> Any:
    ocr = OcrSettings(enabled=True, secret=SecretStr("shared"))
    return build_settings().model_copy(update={"ocr": ocr})


ROUTES = [*((method, path) for path, method in METHODS.items()), ("POST", "/v1/ocr"), ("GET", "/v1/ocr/jobs")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_nothing_begins_while_the_stack_goes_down(method: str, path: str) -> None:
    async with (
        Engine(answers(orjson.dumps(ANSWER))) as engine,
        run_router(engine.record, settings=settings()) as router,
        Engine(answers(b'{"id":"ocr-1"}')) as service,
    ):
        router.app.follow_services((ServiceRecord("s", service.record.base_url),))
        content = chat_body() if method == "POST" else None
        before = await router.client.request(method, path, content=content)
        stop(router)
        answer = await router.client.request(method, path, content=content)
        if method == "POST":
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
            assert answer.headers["retry-after"] == "5"
        elif path == "/ready":
            assert (answer.status_code, answer.json()["ready"]) == (503, False)
        else:
            assert answer.status_code == before.status_code, "whoever only looks may look"


async def test_what_runs_is_finished() -> None:
    may_end = asyncio.Event()

    async def script(exchange: Any) -> None:
        await exchange.start()
        await exchange.chunk(TEXT)
        await may_end.wait()
        await exchange.chunk(LAST + DONE)
        await exchange.end()

    async with Engine(script) as engine, run_router(engine.record) as router:
        request = router.client.build_request("POST", "/v1/chat/completions", content=chat_body(stream=True))
        answer = await router.client.send(request, stream=True)
        stop(router)
        assert (await router.chat()).status_code == 503
        may_end.set()
        assert (await answer.aread()).endswith(b"data: [DONE]\n\n")


async def test_pages_of_documents_that_are_being_read_pass() -> None:
    async with (
        Engine(answers(orjson.dumps(ANSWER))) as engine,
        run_router(engine.record, settings=settings()) as router,
    ):
        stop(router)
        for secret, status in ((b"shared", 200), (b"guessed", 503)):
            credit = CreditSigner(secret).sign("job-1-p1-t1", 0)
            headers = {"x-request-id": "job-1-p1-t1", CREDIT_HEADER: credit}
            for path in ("/v1/chat/completions", QUOTE):
                answer = await router.client.post(path, content=chat_body(), headers=headers)
                assert answer.status_code == status, path


def test_a_stack_that_runs_is_not_stopping() -> None:
    assert not Snapshot((1, 1)).is_stopping
