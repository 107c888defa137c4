"""An engine that dies under its living HTTP server, as vLLM's engine process does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from support.router_stack import MODEL, build_record, build_settings, chat_body, run_router

from serving.cluster.directory import ReplicaRecord
from serving.engine.scripted.app import ScriptedEngine
from serving.http.server import HttpServer
from serving.settings.router import AdmissionSettings
from serving.settings.stack import ScriptSettings


@contextlib.asynccontextmanager
async def run_engine(replica_id: str, *failures: str) -> AsyncIterator[ReplicaRecord]:
    engine = ScriptedEngine(ScriptSettings(output_tokens=8, failures=failures), [MODEL])
    server = HttpServer(engine, host="127.0.0.1", port=0, drain_s=1, has_lifespan=True)
    await server.start()
    try:
        yield build_record(replica_id, server.port)
    finally:
        await server.stop()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_another_replica_answers_what_had_not_begun(is_stream: bool) -> None:
    dying_a, dying_b, living = run_engine("a", "dead"), run_engine("b", "dead"), run_engine("c")
    async with dying_a as a, dying_b as b, living as c, run_router(a, b, c) as router:
        for _ in range(4):
            answer = await router.chat(stream=is_stream)
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.text
            assert not is_stream or answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_the_successor_of_the_only_replica_answers_what_had_not_begun(is_stream: bool) -> None:
    settings = build_settings(admission=AdmissionSettings(replica_wait_s=20))
    dying, living = run_engine("a", "dead"), run_engine("b")
    async with dying as a, living as b, run_router(a, settings=settings) as router:
        asking = [asyncio.create_task(router.chat(stream=is_stream)) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in asking)
        router.records[:] = []
        router.app.refresh()
        await asyncio.sleep(0.1)
        router.records[:] = [b]
        router.app.refresh()
        for answer in await asyncio.gather(*asking):
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.text
            assert not is_stream or answer.text.endswith("data: [DONE]\n\n")


async def test_who_waits_for_a_successor_may_leave() -> None:
    settings = build_settings(admission=AdmissionSettings(replica_wait_s=20))
    async with run_engine("a", "dead") as a, run_router(a, settings=settings) as router:
        with pytest.raises(httpx.ReadTimeout):
            await router.client.post("/v1/chat/completions", content=chat_body(), timeout=0.5)
        assert await router.is_idle()


async def test_a_stream_that_had_begun_ends_with_an_error_event() -> None:
    async with run_engine("a", "dead:after_tokens=3") as a, run_router(a) as router:
        answer = await router.chat(stream=True)
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    assert '"code":"replica_unreachable"' in answer.text.rstrip().rpartition("\n\n")[2]
