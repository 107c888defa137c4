"""Requests of tenants, seen from outside, and the record that each of them leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.types import Message
from support.request_pictures import encode_image, image_part, to_url
from support.router_stack import (
    HEAD,
    USAGE,
    Engine,
    Exchange,
    MemoryJournal,
    RunningRouter,
    Script,
    answers,
    build_settings,
    chat_body,
    dead_replica,
    eventually,
    hang_up,
    run_router,
    streams,
    streams_and_waits,
)

from serving.billing.records import LostTry, Outcome, RequestRecord, TokenCounts
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.settings.router import AdmissionSettings, RouterSettings
from serving.settings.stack import Settings
from serving.settings.tenants import Priority, Tenant

ANSWER = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": USAGE}
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
LAST = b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
USAGE_FRAME = b'data: {"choices":[],"usage":' + orjson.dumps(USAGE) + b"}\n\n"
DONE = b"data: [DONE]\n\n"
COUNTED = TokenCounts(num_prompt_tokens=1000, num_completion_tokens=500)
TOLD = {
    "prompt_tokens": 300,
    "image_tokens": 200,
    "cached_tokens": 0,
    "completion_tokens": 40,
    "is_finished": True,
}


class Recorded:
    """A router and the records of the requests that it served."""

    def __init__(self, router: RunningRouter, journal: MemoryJournal) -> None:
        self.router = router
        self.journal = journal

    @property
    def records(self) -> list[RequestRecord]:
        return self.journal.records

    async def only(self) -> RequestRecord:
        assert await eventually(lambda: bool(self.records))
        (record,) = self.records
        return record


@contextlib.asynccontextmanager
async def recording(*engines: Engine, settings: Settings | None = None) -> AsyncIterator[Recorded]:
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine)
        journal = MemoryJournal()
        running = run_router(*(engine.record for engine in engines), settings=settings, journal=journal)
        yield Recorded(await stack.enter_async_context(running), journal)


def telling(script: Script, told: dict[str, Any] | None = None) -> Script:
    """The script for requests; `told` for questions about what was counted."""

    async def run(exchange: Exchange) -> None:
        if exchange.asked.path.startswith("/usage/"):
            await answers(orjson.dumps(told or TOLD))(exchange)
        else:
            await script(exchange)

    return run


# Records


@pytest.mark.parametrize("asks_for_usage", [True, False])
async def test_a_completed_stream_leaves_its_counts_and_times(asks_for_usage: bool) -> None:
    async with recording(Engine(streams(TEXT, LAST, USAGE_FRAME, DONE))) as recorded:
        page = [{"role": "user", "content": [image_part(to_url(encode_image("PNG")))]}]
        options = {"include_usage": asks_for_usage}
        await recorded.router.chat(messages=page, stream=True, stream_options=options)
        record = await recorded.only()
    assert (record.outcome, record.status, record.error_code) == (Outcome.COMPLETED, 200, "")
    assert (record.tokens, record.cost_nanodollars, record.is_estimated) == (COUNTED, 80_000, False)
    assert (record.tenant_id, record.key_id, record.model) == ("anonymous", "", "nano")
    assert (record.route, record.num_pages, record.is_stream) == ("/v1/chat/completions", 1, True)
    assert (record.replica_id, record.num_tries, record.finish_reason) == ("engine", 1, "length")
    assert 0 < record.arrived_ns <= record.first_byte_ns <= record.ended_ns


async def test_a_whole_answer_leaves_its_counts() -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER)))) as recorded:
        await recorded.router.chat()
        record = await recorded.only()
    assert (record.outcome, record.tokens, record.finish_reason) == (Outcome.COMPLETED, COUNTED, "stop")
    assert (record.cost_nanodollars, record.is_stream, record.num_wasted_tokens) == (80_000, False, 0)


async def ask_app(recorded: Recorded, **fields: Any) -> list[tuple[bytes, int]]:
    """What the app sends, piece by piece, and how many records there were before each."""
    body: list[Message] = [{"type": "http.request", "body": chat_body(**fields), "more_body": False}]
    seen: list[tuple[bytes, int]] = []

    async def receive() -> Message:
        if not body:
            await asyncio.Event().wait()
        return body.pop()

    async def send(message: Message) -> None:
        seen.append((message.get("body", b""), len(recorded.records)))

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    await recorded.router.app(scope, receive, send)
    return seen


@pytest.mark.parametrize("asks_for_usage", [True, False])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_whoever_has_all_of_an_answer_finds_it_in_the_books(is_stream: bool, asks_for_usage: bool) -> None:
    script = streams(TEXT, LAST, USAGE_FRAME, DONE) if is_stream else answers(orjson.dumps(ANSWER))
    options = {"stream_options": {"include_usage": asks_for_usage}} if is_stream else {}
    async with recording(Engine(script)) as recorded:
        seen = await ask_app(recorded, stream=is_stream, **options)
        assert len(recorded.records) == 1
    assert {number for data, number in seen if TEXT in data or LAST in data} <= {0}
    last = [number for data, number in seen if b"[DONE]" in data or b"estimated_cost" in data]
    assert last == [1]


async def test_an_answer_after_a_lost_try_is_promised_before_it_leaves() -> None:
    may_tell = asyncio.Event()

    async def loses(exchange: Exchange) -> None:
        if exchange.asked.path.startswith("/usage/"):
            await may_tell.wait()
            await answers(orjson.dumps(TOLD))(exchange)
        else:
            await hang_up(exchange)

    bad = Engine(loses, "bad", max_num_seqs=1000, answers_usage=True)
    async with recording(bad, Engine(answers(orjson.dumps(ANSWER)), "good")) as recorded:
        while not (promised := [each.promised for each in recorded.journal.opened if each.promised is not None]):
            recorded.records.clear()
            await ask_app(recorded)
        assert not recorded.records, "the lost try has not been told yet"
        may_tell.set()
        record = await recorded.only()
    (promise,) = promised
    assert (promise.outcome, promise.tokens, promise.cost_nanodollars) == (Outcome.COMPLETED, COUNTED, 80_000)
    assert dataclasses.replace(record, num_wasted_tokens=0, lost_tries=(), ended_ns=promise.ended_ns) == promise
    assert record.lost_tries == (LostTry("bad", 300, 40),)


async def test_a_stream_that_breaks_behind_its_usage_is_counted_once() -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(TEXT + USAGE_FRAME)
        await exchange.die()

    async with recording(Engine(telling(breaks), answers_usage=True)) as recorded:
        response = await recorded.router.chat(stream=True, stream_options={"include_usage": True})
        record = await recorded.only()
    assert b"estimated_cost" not in response.content, "it costs nothing"
    assert (record.outcome, record.tokens, record.cost_nanodollars) == (Outcome.FAILED, COUNTED, 0)
    assert (record.lost_tries, record.num_wasted_tokens) == ((), 500)


@pytest.mark.parametrize("frames", [(), (TEXT, TEXT)], ids=["before the answer", "in the middle"])
async def test_what_a_client_used_before_it_left_is_asked_of_the_engine_and_billed(frames: tuple[bytes, ...]) -> None:
    left = asyncio.Event()
    engine = Engine(telling(streams_and_waits(left, *frames)), answers_usage=True)
    async with recording(engine) as recorded:
        _, writer = await asyncio.open_connection("127.0.0.1", recorded.router.port)
        body = chat_body(stream=True)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        )
        assert await eventually(lambda: bool(engine.asked))
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(1):
            await left.wait()
        record = await recorded.only()
    assert (record.outcome, record.status) == (Outcome.ABORTED, 200 if frames else 499)
    assert record.tokens == TokenCounts(num_prompt_tokens=300, num_image_tokens=200, num_completion_tokens=40)
    assert (record.cost_nanodollars, record.is_estimated) == (13_000, False)
    assert engine.asked[-1].path == f"/usage/{record.request_id}"


async def test_an_engine_that_has_not_noticed_yet_is_asked_again() -> None:
    left = asyncio.Event()
    counts = iter([{**TOLD, "is_finished": False, "completion_tokens": 1}, {**TOLD, "completion_tokens": 2}])

    async def script(exchange: Exchange) -> None:
        if exchange.asked.path.startswith("/usage/"):
            await answers(orjson.dumps(next(counts)))(exchange)
        else:
            await streams_and_waits(left, TEXT)(exchange)

    async with recording(Engine(script, answers_usage=True)) as recorded:
        async with recorded.router.client.stream("POST", "/v1/chat/completions", content=chat_body(stream=True)) as it:
            await anext(it.aiter_raw())
        record = await recorded.only()
    assert record.tokens.num_completion_tokens == 2


async def test_what_a_lost_engine_generated_is_estimated_and_not_billed() -> None:
    async def dies(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(TEXT * 3)
        await exchange.die()

    async with recording(Engine(dies)) as recorded:
        response = await recorded.router.chat(stream=True)
        record = await recorded.only()
    assert b"replica_unreachable" in response.content
    assert (record.outcome, record.status, record.error_code) == (Outcome.FAILED, 200, "replica_unreachable")
    assert (record.tokens.num_completion_tokens, record.is_estimated) == (3, True)
    assert (record.cost_nanodollars, record.num_wasted_tokens) == (0, 3)


async def test_what_a_failed_try_generated_is_wasted() -> None:
    bad = Engine(telling(hang_up), "bad", max_num_seqs=1000, answers_usage=True)
    good = Engine(answers(orjson.dumps(ANSWER)), "good")
    async with recording(bad, good) as recorded:
        while not any(asked.path.startswith("/v1") for asked in bad.asked):
            recorded.records.clear()
            await recorded.router.chat()
            assert await recorded.router.is_idle()
        record = await recorded.only()
    assert (record.outcome, record.num_tries, record.replica_id) == (Outcome.COMPLETED, 2, "good")
    assert (record.tokens, record.num_wasted_tokens, record.cost_nanodollars) == (COUNTED, 40, 80_000)


async def test_who_was_never_connected_has_wasted_nothing() -> None:
    with dead_replica("dead") as dead:
        async with recording(Engine(answers(orjson.dumps(ANSWER)))) as recorded:
            recorded.router.records.insert(0, dead)
            for _ in range(16):
                await recorded.router.chat()
            assert max(record.num_tries for record in recorded.records) == 2
            assert {record.num_wasted_tokens for record in recorded.records} == {0}
            assert {record.outcome for record in recorded.records} == {Outcome.COMPLETED}


@pytest.mark.parametrize(
    ("body", "status", "code"), [(b"{", 400, "invalid_json"), (chat_body(model="gpt-9"), 404, "model_not_found")]
)
async def test_a_refused_request_leaves_a_record_that_costs_nothing(body: bytes, status: int, code: str) -> None:
    async with recording(Engine(answers(b"{}"))) as recorded:
        response = await recorded.router.client.post("/v1/chat/completions", content=body)
        record = await recorded.only()
    assert (response.status_code, record.status) == (status, status)
    assert (record.outcome, record.error_code, record.cost_nanodollars) == (Outcome.REFUSED, code, 0)
    assert (record.tokens, record.replica_id, record.num_tries) == (TokenCounts(), "", 0)


async def test_what_the_engine_refuses_is_refused() -> None:
    body = orjson.dumps({"error": {"message": "too long", "code": 400}})
    async with recording(Engine(answers(body, status=400))) as recorded:
        await recorded.router.chat()
        record = await recorded.only()
    assert (record.outcome, record.status, record.num_tries) == (Outcome.REFUSED, 400, 1)


# Time


@pytest.mark.parametrize("frames", [(), (TEXT,)], ids=["before the answer", "in the middle"])
async def test_a_request_ends_when_its_time_is_over(frames: tuple[bytes, ...]) -> None:
    left = asyncio.Event()
    engine = Engine(telling(streams_and_waits(left, *frames)), answers_usage=True)
    async with recording(engine) as recorded:
        response = await recorded.router.client.post(
            "/v1/chat/completions", content=chat_body(stream=True), headers={"x-request-timeout-ms": "200"}
        )
        async with asyncio.timeout(1):
            await left.wait()
        record = await recorded.only()
    if frames:
        assert (response.status_code, response.content.startswith(TEXT)) == (200, True)
        assert orjson.loads(response.content.split(b"data: ")[-1])["error"]["code"] == "request_timeout"
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert (record.outcome, record.error_code) == (Outcome.TIMED_OUT, "request_timeout")
    assert record.cost_nanodollars == 13_000, "what the client let run is billed"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "9" * 13, ""])
async def test_a_time_that_is_none_is_refused(value: str) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER)))) as recorded:
        response = await recorded.router.client.post(
            "/v1/chat/completions", content=chat_body(), headers={"x-request-timeout-ms": value}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_timeout")


async def test_who_waits_too_long_for_a_place_is_told_when_to_come_back() -> None:
    left = asyncio.Event()
    settings = build_settings(admission=AdmissionSettings(work_per_replica=1))
    async with recording(Engine(streams_and_waits(left)), settings=settings) as recorded:
        router = recorded.router
        running = asyncio.create_task(router.chat())
        assert await eventually(lambda: not router.app.is_idle)
        await asyncio.sleep(0.05)
        headers = {"x-request-timeout-ms": "100"}
        response = await router.client.post("/v1/chat/completions", content=chat_body(), headers=headers)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "deadline_unmeetable"
        assert int(response.headers["retry-after"]) >= 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await eventually(lambda: len(recorded.records) == 2)
    outcomes = {record.error_code: record.outcome for record in recorded.records}
    assert outcomes["deadline_unmeetable"] is Outcome.REFUSED


async def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    left = asyncio.Event()
    settings = build_settings(admission=AdmissionSettings(work_per_replica=1, max_queue=1))
    async with recording(Engine(streams_and_waits(left)), settings=settings) as recorded:
        router = recorded.router
        running = asyncio.create_task(router.chat())
        assert await eventually(lambda: not router.app.is_idle)
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(router.chat())
        assert await eventually(lambda: router.num_queued == 1)
        refused = await router.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        waiting.cancel()
        assert await eventually(lambda: router.num_queued == 0)
        running.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)


# Ids


@pytest.mark.parametrize(
    ("given", "is_kept"), [("job-7:page.3", True), ("", False), ("a b", False), ("x" * 129, False)]
)
async def test_the_clients_own_id_is_kept_if_it_is_sane(given: str, is_kept: bool) -> None:
    engine = Engine(answers(orjson.dumps(ANSWER)))
    async with recording(engine) as recorded:
        for _ in range(2):
            response = await recorded.router.client.post(
                "/v1/chat/completions", content=chat_body(), headers={"x-request-id": given}
            )
            shown = response.headers["x-request-id"]
            assert (shown == given) is is_kept
        ids = [record.request_id for record in recorded.records]
        assert len(set(ids)) == 2, "an id that is used twice is two rows"
        assert [asked.headers["x-request-id"] for asked in engine.asked] == ids
        assert not is_kept or all(each.startswith(given) for each in ids)


@pytest.mark.parametrize("path", ["/health", "/v1/nothing"])
async def test_every_answer_has_an_id(path: str) -> None:
    async with recording(Engine(answers(b"{}"))) as recorded:
        assert len((await recorded.router.client.get(path)).headers["x-request-id"]) == 32


# Tenants


@dataclasses.dataclass
class Tenants:
    settings: Settings
    keys: dict[str, str]
    file: Path

    def header(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[name]}"}


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    limits = {
        "acme": Tenant(requests_per_minute=3, tokens_per_minute=100_000),
        "small": Tenant(tokens_per_minute=600),
        "one": Tenant(max_concurrent=1, priority=Priority.HIGH),
        "other": Tenant(models=("large",)),
        "ops": Tenant(),
    }
    made = {name: make_key(name, created=datetime.now(UTC), is_admin=name == "ops") for name in limits}
    file = tmp_path / "keys.yaml"
    write_keys(file, KeysFile(tenants=limits, keys=tuple(record for _, record in made.values())))
    return Tenants(build_settings(keys_file=file), {name: text for name, (text, _) in made.items()}, file)


async def test_without_a_key_nobody_gets_in(tenants: Tenants) -> None:
    engine = Engine(answers(orjson.dumps(ANSWER)))
    async with recording(engine, settings=tenants.settings) as recorded:
        client = recorded.router.client
        for headers in ({}, {"authorization": "Bearer sk-wrong"}):
            for response in (
                await client.post("/v1/chat/completions", content=chat_body(), headers=headers),
                await client.get("/v1/models", headers=headers),
            ):
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
        assert engine.asked == []
        assert recorded.records == [], "strangers do not fill the ledger"
        response = await client.post("/v1/chat/completions", content=chat_body(), headers=tenants.header("acme"))
        record = await recorded.only()
    assert response.status_code == 200
    assert (record.tenant_id, record.key_id) == ("acme", tenants.keys["acme"].split("-")[1])


async def test_a_tenants_requests_per_minute_are_told_and_kept(tenants: Tenants) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=tenants.settings) as recorded:
        client = recorded.router.client
        for remaining in ("2", "1", "0"):
            response = await client.post("/v1/chat/completions", content=chat_body(), headers=tenants.header("acme"))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == remaining
            assert response.headers["x-ratelimit-limit-tokens"] == "100000"
            assert "x-ratelimit-reset-tokens" in response.headers
        refused = await client.post("/v1/chat/completions", content=chat_body(), headers=tenants.header("acme"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        other = await client.post("/v1/chat/completions", content=chat_body(), headers=tenants.header("one"))
        assert other.status_code == 200
        assert "x-ratelimit-limit-requests" not in other.headers


async def test_a_tenants_tokens_are_counted_as_the_engine_counts_them(tenants: Tenants) -> None:
    body = chat_body(max_tokens=10)
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=tenants.settings) as recorded:
        client = recorded.router.client
        first = await client.post("/v1/chat/completions", content=body, headers=tenants.header("small"))
        assert first.status_code == 200
        # It took 1500 tokens of 600: what was not foreseen is owed.
        second = await client.post("/v1/chat/completions", content=body, headers=tenants.header("small"))
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert second.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_tenants_concurrent_requests_are_bounded(tenants: Tenants) -> None:
    left = asyncio.Event()
    async with recording(Engine(streams_and_waits(left)), settings=tenants.settings) as recorded:
        client, headers = recorded.router.client, tenants.header("one")
        running = asyncio.create_task(client.post("/v1/chat/completions", content=chat_body(), headers=headers))
        assert await eventually(lambda: not recorded.router.app.is_idle)
        refused = await client.post("/v1/chat/completions", content=chat_body(), headers=headers)
        assert refused.status_code == 429
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_tenant_gets_its_own_models_only(tenants: Tenants) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=tenants.settings) as recorded:
        client, headers = recorded.router.client, tenants.header("other")
        refused = await client.post("/v1/chat/completions", content=chat_body(), headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        assert (await client.get("/v1/models", headers=headers)).json()["data"] == []
        assert (await client.get("/v1/models/nano", headers=headers)).status_code == 404


async def test_the_state_is_for_admins(tenants: Tenants) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=tenants.settings) as recorded:
        client = recorded.router.client
        refused = await client.get("/admin/state", headers=tenants.header("acme"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        await client.post("/v1/chat/completions", content=chat_body(), headers=tenants.header("acme"))
        assert await recorded.router.is_idle()
        state = (await client.get("/admin/state", headers=tenants.header("ops"))).json()
    (replica,) = state["replicas"]
    assert (replica["replica_id"], replica["work_tokens"], replica["breaker"]) == ("engine", 0, "closed")
    assert state["tenants"]["acme"] == {"requests": 1, "tokens": 1500, "running": 0, "documents": 0, "lookups": 0}
    assert {queue["requests"] for queue in state["queues"]} == {0}


async def test_a_key_that_is_taken_away_stops_working(tenants: Tenants) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=tenants.settings) as recorded:
        client, headers = recorded.router.client, tenants.header("ops")
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        write_keys(tenants.file, KeysFile(tenants={"ops": Tenant()}))
        recorded.router.app.tick()
        await asyncio.sleep(0.2)
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_the_metrics_follow_the_records(tenants: Tenants) -> None:
    async with recording(Engine(answers(orjson.dumps(ANSWER))), settings=tenants.settings) as recorded:
        await recorded.router.client.post("/v1/chat/completions", content=chat_body(), headers=tenants.header("acme"))
        await recorded.only()
        text = recorded.router.app.render_metrics().decode()
    assert 'serving_tokens_total{kind="completion",model="nano",tenant="acme"} 500.0' in text
    assert 'serving_replicas{model="nano",state="ready"} 1.0' in text


async def test_the_document_describes_every_route() -> None:
    async with recording(Engine(answers(b"{}"))) as recorded:
        document = (await recorded.router.client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(document["paths"])


# Usage for clients of DeepInfra


@pytest.mark.parametrize(("path", "fields"), [("chat/completions", {}), ("completions", {"prompt": "a"})])
@pytest.mark.parametrize(("prefix", "where"), [("/v1/openai/", "asked"), ("/v1/", "finish_chunk")])
async def test_a_client_of_deepinfra_finds_the_usage_where_it_looks(
    prefix: str, where: str, path: str, fields: dict[str, Any]
) -> None:
    """The loop of their documentation: https://deepinfra.com/docs, "Streaming"."""
    body = orjson.dumps({"model": "nano", "stream": True, **fields}) if fields else chat_body(stream=True)
    engine = Engine(streams(TEXT, LAST, USAGE_FRAME, DONE))
    async with recording(engine, settings=build_settings(stream_usage=where)) as recorded:
        answer = await recorded.router.client.post(prefix + path, content=body)
        chunks = [orjson.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        assert (len(chunks), answer.text.endswith("data: [DONE]\n\n")) == (2, True)
        usage = next(event["usage"] for event in chunks if event["choices"][0].get("finish_reason"))
        assert (usage["prompt_tokens"], usage["estimated_cost"]) == (1000, 0.00008)


async def test_a_stream_has_usage_in_a_chunk_of_its_own_if_the_settings_say_so() -> None:
    engine = Engine(streams(TEXT, LAST, USAGE_FRAME, DONE))
    async with recording(engine, settings=build_settings(stream_usage="extra_chunk")) as recorded:
        answer = await recorded.router.client.post("/v1/chat/completions", content=chat_body(stream=True))
        last = orjson.loads(answer.text.split("\n\n")[-3][6:])
        assert (last["choices"], last["usage"]["estimated_cost"]) == ([], 0.00008)
        assert answer.text.count("estimated_cost") == 1


def test_a_stream_has_usage_where_all_clients_accept_it_unless_the_settings_say_otherwise() -> None:
    assert RouterSettings().stream_usage == "finish_chunk"


@pytest.mark.parametrize("prefix", ["/v1/openai/", "/v1/"])
async def test_who_asks_for_usage_gets_the_chunk_that_openai_defines(prefix: str) -> None:
    async with recording(Engine(streams(TEXT, LAST, USAGE_FRAME, DONE))) as recorded:
        body = chat_body(stream=True, stream_options={"include_usage": True})
        answer = await recorded.router.client.post(prefix + "chat/completions", content=body)
        last = orjson.loads(answer.text.split("\n\n")[-3][6:])
        assert (last["choices"], last["usage"]["estimated_cost"]) == ([], 0.00008)
        assert answer.text.count("estimated_cost") == 1
        plain = await recorded.router.client.post("/v1/chat/completions", content=chat_body(stream=True))
        assert "usage" not in plain.text
