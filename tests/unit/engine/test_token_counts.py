from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from serving.engine.token_counts import EngineUsage, SequenceCounts, UsageApp
from serving.settings.telemetry import TelemetrySettings


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Sequence:
    """What an engine knows of a sequence: changes while it runs."""

    def __init__(self, prompt: int = 0, completion: int = 0, image: int = 0, cached: int = 0) -> None:
        self.counts = SequenceCounts(prompt, image, cached, completion)

    def __call__(self) -> SequenceCounts:
        return self.counts


def build() -> tuple[EngineUsage, Clock]:
    clock = Clock()
    return EngineUsage(clock), clock


def short(found: dict[str, Any] | None) -> tuple[int, int, str, bool] | None:
    if found is None:
        return None
    return found["prompt_tokens"], found["completion_tokens"], found["finish_reason"], found["is_finished"]


def test_a_request_is_told_while_it_runs_and_after() -> None:
    usage, _ = build()
    sequence = Sequence()
    usage.open("a")
    assert short(usage.find("a")) == (0, 0, "", False)
    usage.begin("s", "chatcmpl-a", sequence)
    sequence.counts = SequenceCounts(100, 64, 16, 3)
    assert short(usage.find("a")) == (100, 3, "", False)
    sequence.counts = SequenceCounts(100, 64, 16, 5)
    usage.end("s", "length")
    assert short(usage.find("a")) == (100, 5, "length", False), "its answer is still being sent"
    usage.close("a")
    assert usage.find("a") == {
        "request_id": "a",
        "prompt_tokens": 100,
        "image_tokens": 64,
        "cached_tokens": 16,
        "completion_tokens": 5,
        "finish_reason": "length",
        "is_finished": True,
    }


def test_a_client_that_leaves_is_not_finished_before_its_sequence_is() -> None:
    usage, _ = build()
    usage.open("a")
    usage.begin("s", "chatcmpl-a", Sequence(10, 2))
    usage.close("a")
    assert short(usage.find("a")) == (10, 2, "", False)
    usage.end("s", "abort")
    assert short(usage.find("a")) == (10, 2, "abort", True)


def test_a_request_that_the_engine_never_saw_has_used_nothing() -> None:
    usage, _ = build()
    usage.open("a")
    usage.close("a")
    assert short(usage.find("a")) == (0, 0, "", True)
    assert usage.find("b") is None


def test_choices_share_their_prompt_and_prompts_add_up() -> None:
    usage, _ = build()
    usage.open("a")
    for number in range(2):
        for choice in range(3):
            usage.begin(f"{choice}_{number}", f"cmpl-a-{number}", Sequence(10 + number, 5))
    assert short(usage.find("a")) == (21, 30, "", False)
    for number in range(2):
        for choice in range(3):
            usage.end(f"{choice}_{number}", "abort" if choice else "stop")
    usage.close("a")
    assert short(usage.find("a")) == (21, 30, "abort", True)
    assert usage.totals()["prompt_tokens"] == 21
    assert usage.totals()["completion_tokens"] == 30


@pytest.mark.parametrize(
    ("opened", "engine_id", "request_id"),
    [
        ("a", "chatcmpl-a", "a"),
        ("a-1", "chatcmpl-a-1", "a-1"),
        ("a_1", "chatcmpl-a_1", "a_1"),
        ("a", "chatcmpl-a_1", "a"),
        (None, "chatcmpl-a_1", "a_1"),
        ("a", "cmpl-a-0", "a"),
        ("a-1", "cmpl-a-1-12", "a-1"),
        ("chatcmpl-a", "chatcmpl-chatcmpl-a", "chatcmpl-a"),
        (None, "resp_17", "resp_17"),
        (None, "cmpl-a", "cmpl-a"),
    ],
)
def test_vllms_names_lead_back_to_the_request(opened: str | None, engine_id: str, request_id: str) -> None:
    usage, _ = build()
    if opened is not None:
        usage.open(opened)
    assert usage.request_id_of(engine_id) == request_id


def test_an_id_that_comes_twice_adds_up() -> None:
    usage, _ = build()
    for number in range(2):
        usage.open("a")
        usage.begin(f"s{number}", "chatcmpl-a", Sequence(10, 5))
        usage.end(f"s{number}", "abort")
        usage.close("a")
    assert usage.find("a") is not None
    assert usage.totals()["completion_tokens"] == 10
    assert short(usage.find("a")) == (10, 10, "abort", True)
    assert usage.totals()["requests"] == 1


def test_totals_include_what_runs_and_do_not_jump_when_it_ends() -> None:
    usage, _ = build()
    sequence = Sequence(10, 1)
    usage.begin("s", "chatcmpl-a", sequence)
    usage.begin("t", "chatcmpl-b", Sequence(7, 2))
    before = usage.totals()
    assert (before["prompt_tokens"], before["completion_tokens"], before["running"]) == (17, 3, 2)
    usage.end("s", "stop")
    after = usage.totals()
    assert (after["prompt_tokens"], after["completion_tokens"], after["running"]) == (17, 3, 1)
    assert abs(after["started_ns"] - time.time_ns()) < 60e9


def test_the_death_of_the_engine_ends_what_ran() -> None:
    usage, _ = build()
    usage.begin("s", "chatcmpl-a", Sequence(10, 1))
    usage.end_all("error")
    usage.end_all("error")
    usage.end("unknown", "stop")
    assert short(usage.find("a")) == (10, 1, "error", True)


def test_the_finished_are_forgotten_by_age_and_by_number() -> None:
    usage, clock = build()
    usage.open("running")
    for number in range(10_050):
        usage.open(str(number))
        usage.close(str(number))
    assert usage.find("49") is None
    assert usage.find("50") is not None
    clock.now_s = 599
    assert usage.find("50") is not None
    clock.now_s = 601
    assert usage.find("10049") is None
    assert usage.find("running") is not None
    assert usage.totals()["requests"] == 0, "none had its prompt computed"


# Over HTTP


class App:
    """Answers when it may; a stand-in for the engine's app."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.has_begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.has_begun.set()
        if scope["method"] == "POST":
            await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})


def client(app: UsageApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")


async def test_requests_are_announced_by_their_header_while_they_run() -> None:
    inner, usage = App(), EngineUsage()
    app = UsageApp(inner, usage, None)
    async with client(app) as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", headers={"x-request-id": "a"}))
        await inner.has_begun.wait()
        assert app.num_running == 1
        assert (await http.get("/usage/a")).json()["is_finished"] is False
        idle = asyncio.create_task(app.wait_idle())
        await asyncio.sleep(0.01)
        assert not idle.done()
        inner.may_answer.set()
        assert (await asking).text == "/v1/chat/completions"
        await idle
        assert app.num_running == 0
        assert time.monotonic() - app.last_end_s < 10
        assert (await http.get("/usage/a")).json()["is_finished"] is True
        assert (await http.get("/usage")).json()["requests"] == 0, "no prompt was computed"
        assert (await http.get("/usage/b")).status_code == 404
        assert (await http.get("/metrics")).text == "/metrics"
        assert (await http.post("/v1/completions")).text == "/v1/completions"
        assert (await http.get("/usage")).json()["requests"] == 0


async def test_who_does_not_bring_the_engines_key_is_told_nothing() -> None:
    app = UsageApp(App(), EngineUsage(), "sesame")
    async with client(app) as http:
        for headers in ({}, {"authorization": "Bearer open"}, {"authorization": "Basic sesame"}):
            for path in ("/usage", "/usage/a", "/v1/models", "/invocations", "/tokenize", "/metrics", "/metrics/"):
                answer = await http.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
        for scheme in ("Bearer", "bearer"):
            assert (await http.get("/usage", headers={"authorization": f"{scheme} sesame"})).status_code == 200
        assert (await http.post("/usage", headers={"authorization": "Bearer sesame"})).status_code == 405
        assert (await http.get("/health")).text == "/health"
        assert (await http.get("/metrics", headers={"authorization": "Bearer sesame"})).text == "/metrics"


@pytest.mark.parametrize(
    ("telemetry", "is_open"),
    [
        (TelemetrySettings(), False),
        (TelemetrySettings(metrics_host="auto"), True),
        (TelemetrySettings(metrics_host="auto", metrics_key=SecretStr("scrape")), False),
        (TelemetrySettings(metrics_key=SecretStr("scrape")), False),
    ],
)
async def test_an_engines_metrics_are_open_only_where_the_settings_open_them(
    telemetry: TelemetrySettings, is_open: bool
) -> None:
    app = UsageApp(App(), EngineUsage(), "sesame", telemetry)
    async with client(app) as http:
        assert ((await http.get("/metrics")).status_code == 200) is is_open
        scrape = {"authorization": "Bearer scrape"}
        has_key = telemetry.metrics_key is not None
        assert ((await http.get("/metrics", headers=scrape)).status_code == 200) is (has_key or is_open)
        assert (await http.get("/usage", headers=scrape)).status_code == 401
