"""vLLM's own span of a request, below the router's, below the client's."""

from __future__ import annotations

import openai
from support.collector import Collector, SeenSpan

from e2e.conftest import Stack

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "zebra"


def test_the_engines_span_is_joined_to_the_routers(stack: Stack, client: openai.OpenAI, collector: Collector) -> None:
    answer = client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": SECRET}],
        max_tokens=5,
        extra_headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"},
    )
    assert answer.usage is not None

    def ours(span: SeenSpan) -> bool:
        return span.trace_id == TRACE_ID

    request = collector.wait_for(lambda span: ours(span) and span.name == "POST /v1/chat/completions")
    attempt = collector.wait_for(lambda span: ours(span) and span.name == "engine")
    engine = collector.wait_for(lambda span: ours(span) and span.name == "llm_request")
    assert (request.parent_id, attempt.parent_id, engine.parent_id) == (SPAN_ID, request.span_id, attempt.span_id)
    assert (request.service, engine.service) == ("serving-router", "serving-engine")
    assert request.attributes["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
    assert engine.attributes["gen_ai.usage.completion_tokens"] == answer.usage.completion_tokens
    assert not any(SECRET.encode() in body for body in collector.bodies), "no prompt leaves the stack"
