"""Traces of requests, taken by a real collector, and the context that engines get."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.collector import Collector, run_collector
from support.router_stack import (
    Engine,
    answers,
    build_settings,
    chat_body,
    hang_up,
    run_router,
    streams,
    streams_and_waits,
)

from serving.settings.stack import Settings
from serving.settings.telemetry import TelemetrySettings

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ANSWER = b'{"choices":[],"usage":{"prompt_tokens":1000,"total_tokens":1500,"completion_tokens":500}}'
SECRET = "what is in nobody's business"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with run_collector() as collector:
        yield collector


def settings_with(url: str | None, **telemetry: float) -> Settings:
    return build_settings().model_copy(update={"telemetry": TelemetrySettings(otlp_endpoint=url, **telemetry)})


async def test_a_request_is_a_span_with_one_below_it_for_every_try(collector: Collector) -> None:
    settings = settings_with(collector.url)
    async with Engine(hang_up, "lost") as lost, Engine(answers(ANSWER), "well") as well:  # noqa: SIM117
        async with run_router(lost.record, well.record, settings=settings) as router:
            while not lost.asked:  # whichever comes first is chance
                answer = await router.client.post(
                    "/v1/chat/completions",
                    content=chat_body(messages=[{"role": "user", "content": SECRET}]),
                    headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "x-request-id": f"page-{len(well.asked)}"},
                )
                assert answer.status_code == 200
    (name,) = {f"page-{len(well.asked) - 1}"}

    def is_it(span: object) -> bool:
        return str(getattr(span, "attributes", {}).get("serving.request_id", "")).startswith(f"{name}.")

    request = collector.wait_for(is_it)
    assert (request.name, request.service) == ("POST /v1/chat/completions", "serving-router")
    assert (request.trace_id, request.parent_id) == (TRACE_ID, SPAN_ID)
    assert not request.is_failed
    assert request.attributes["gen_ai.usage.output_tokens"] == 500
    assert request.attributes["serving.outcome"] == "completed"
    assert request.attributes["serving.tries"] == 2
    assert request.events == ("first_byte",)
    tries = sorted((span for span in collector.spans if span.parent_id == request.span_id), key=lambda s: s.start_ns)
    assert [(span.attributes["serving.replica"], span.is_failed) for span in tries] == [("lost", True), ("well", False)]
    assert tries[0].attributes["error.type"] == "replica_unreachable"
    assert all(request.start_ns <= span.start_ns <= span.end_ns <= request.end_ns for span in tries)
    for engine, span in ((lost, tries[0]), (well, tries[1])):
        assert engine.asked[-1].headers["traceparent"] == f"00-{TRACE_ID}-{span.span_id}-01"
    assert not any(SECRET.encode() in body for body in collector.bodies)


async def test_requests_that_are_refused_fail_or_are_left_have_spans_too(collector: Collector) -> None:
    left = asyncio.Event()
    async with Engine(hang_up, "only") as only:  # noqa: SIM117
        async with run_router(only.record, settings=settings_with(collector.url)) as router:
            assert (await router.chat()).status_code == 502
            assert (await router.chat(max_tokens=-1)).status_code == 400
            only.script = streams_and_waits(left, b'data: {"choices":[]}\n\n')
            async with router.client.stream("POST", "/v1/chat/completions", content=chat_body(stream=True)) as answer:
                await anext(answer.aiter_bytes())
            await asyncio.wait_for(left.wait(), 5)
    seen = {
        outcome: collector.wait_for(lambda span, outcome=outcome: span.attributes.get("serving.outcome") == outcome)  # type: ignore[misc]
        for outcome in ("failed", "refused", "aborted")
    }
    assert {outcome: span.is_failed for outcome, span in seen.items()} == {
        "failed": True,
        "refused": False,
        "aborted": False,
    }
    assert seen["failed"].attributes["error.type"] == "replica_unreachable"
    assert seen["refused"].attributes["http.response.status_code"] == 400
    assert len({span.trace_id for span in seen.values()}) == 3


@pytest.mark.parametrize("header", ["nonsense", f"00-{TRACE_ID}-{SPAN_ID}-01", "00-" + "0" * 32 + f"-{SPAN_ID}-01"])
async def test_a_client_does_not_decide_how_much_is_traced(header: str) -> None:
    with run_collector() as collector:
        async with Engine(answers(ANSWER)) as engine:
            async with run_router(engine.record, settings=settings_with(collector.url, trace_ratio=0.0)) as router:
                answer = await router.client.post(
                    "/v1/chat/completions", content=chat_body(), headers={"traceparent": header}
                )
                assert answer.status_code == 200
            flags = int(engine.asked[-1].headers["traceparent"].rpartition("-")[2], 16)
            assert not flags & 1, "engines trace nothing either"
        assert collector.spans == []


async def test_without_an_endpoint_engines_get_no_context() -> None:
    async with Engine(streams(b"data: [DONE]\n\n")) as engine, run_router(engine.record) as router:
        await router.client.post(
            "/v1/chat/completions",
            content=chat_body(stream=True),
            headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"},
        )
    assert "traceparent" not in engine.asked[-1].headers


def test_without_an_endpoint_the_sdk_is_not_imported() -> None:
    code = "import sys, serving.router.app; assert not [name for name in sys.modules if 'opentelemetry.sdk' in name]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_a_collector_that_is_away_delays_no_answer() -> None:
    async with Engine(answers(ANSWER)) as engine:  # noqa: SIM117
        async with run_router(engine.record, settings=settings_with("http://127.0.0.1:9")) as router:
            for _ in range(3):
                assert (await router.chat()).status_code == 200


@pytest.mark.parametrize(
    "url", ["collector:4318", "grpc://collector:4317", "http://", "http://me:key@c:4318", "http://c?k=1"]
)
def test_what_is_no_address_of_a_collector_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        TelemetrySettings(otlp_endpoint=url)
