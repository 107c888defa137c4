"""The hostile corpus against a router on a real port: what the router has to refuse, it refuses without an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson
import psutil
import pytest
import pytest_asyncio
from hostile.corpus import CORPUS, Entry, Judge, chat
from hostile.wire import send
from support.router_stack import MAX_BODY_BYTES, MODEL, USAGE, Engine, answers, build_settings

from serving.cluster.directory import Snapshot
from serving.http.server import HttpServer
from serving.router.app import RouterApp
from serving.settings.router import LimitSettings

# One router and one engine for the whole corpus: what an entry leaves behind has to show in the ones after it.
pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT_S = 20
"""Of one request on a busy machine; on an idle one they take milliseconds."""
MAX_GROWTH_BYTES = 64 * 2**20
LIMITS = LimitSettings(max_body_bytes=8 * MAX_BODY_BYTES)
"""Bodies of the corpus's megabyte have to be looked into; those over the limit are larger than this one's."""
ANSWER = {"id": "c-1", "model": MODEL, "choices": [{"message": {"content": "Hi"}}], "usage": USAGE}


@dataclass
class Target:
    port: int
    engine: Engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[Target]:
    async with Engine(answers(orjson.dumps(ANSWER))) as engine:
        app = RouterApp(build_settings(limits=LIMITS), read_snapshot=lambda: Snapshot((1, 1), (engine.record,)))
        server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1, limits=LIMITS)
        await app.start()
        await server.start()
        yield Target(server.port, engine)
        await server.stop()
        await app.close()


def entries(judge: Judge) -> list[Entry]:
    return [entry for entry in CORPUS if entry.judge is judge]


async def test_the_corpus_is_as_large_as_it_should_be() -> None:
    assert len(entries(Judge.ROUTER)) >= 200
    assert len({entry.name for entry in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("entry", entries(Judge.ROUTER), ids=lambda entry: entry.name)
async def test_the_router_refuses_it_and_asks_no_engine(target: Target, entry: Entry) -> None:
    target.engine.asked.clear()
    answer = await send(target.port, entry.raw, timeout_s=TIMEOUT_S)
    assert 400 <= answer.status < 500, answer
    assert answer.headers["content-type"] == "application/json"
    if not entry.raw.startswith(b"HEAD"):
        answer.error()
    assert target.engine.asked == []
    good = await send(target.port, chat(), timeout_s=TIMEOUT_S)
    assert good.status == 200


@pytest.mark.parametrize("entry", entries(Judge.NOBODY) + entries(Judge.ENGINE), ids=lambda entry: entry.name)
async def test_what_it_cannot_judge_goes_to_the_engine(target: Target, entry: Entry) -> None:
    target.engine.asked.clear()
    answer = await send(target.port, entry.raw, timeout_s=TIMEOUT_S)
    assert answer.status == 200, answer
    assert len(target.engine.asked) == 1


async def test_the_whole_corpus_leaves_no_memory_behind(target: Target) -> None:
    """The tests above have sent it once: what is only allocated once, has been."""
    before_bytes = psutil.Process().memory_info().rss
    for entry in entries(Judge.ROUTER):
        await send(target.port, entry.raw, timeout_s=TIMEOUT_S)
    assert psutil.Process().memory_info().rss - before_bytes < MAX_GROWTH_BYTES
