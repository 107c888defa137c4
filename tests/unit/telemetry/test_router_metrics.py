from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.billing.records import Outcome, RequestRecord, TokenCounts
from serving.telemetry import catalogue
from serving.telemetry.router_metrics import Reading, RouterMetrics

SECOND = 10**9
RECORD = RequestRecord(
    request_id="r-1",
    tenant_id="acme",
    key_id="k",
    model="nano",
    route="/v1/chat/completions",
    outcome=Outcome.COMPLETED,
    status=200,
    modes=("tiny", "base", "tiny"),
    num_pages=3,
    tokens=TokenCounts(num_prompt_tokens=1000, num_image_tokens=900, num_cached_tokens=100, num_completion_tokens=101),
    num_wasted_tokens=7,
    cost_nanodollars=40_100,
    num_tries=3,
    arrived_ns=SECOND,
    first_byte_ns=3 * SECOND,
    ended_ns=13 * SECOND,
    queue_wait_ns=SECOND // 2,
    priority="high",
    is_stream=True,
)


def scrape(metrics: RouterMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def count(*records: RequestRecord, state: tuple[Reading, ...] = ()) -> Any:
    metrics = RouterMetrics(lambda: state)
    for record in records:
        metrics.count(record)
    samples = scrape(metrics)

    def value(name: str, **labels: str) -> float | None:
        return samples.get((name, tuple(sorted(labels.items()))))

    return value


def test_a_completed_stream_is_counted_in_every_way() -> None:
    value = count(RECORD)
    labels = {"route": "/v1/chat/completions", "tenant": "acme", "model": "nano"}
    assert value("serving_requests_total", **labels, outcome="completed", status="200") == 1
    kinds = {"prompt": 1000, "image": 900, "cached": 100, "completion": 101, "wasted": 7}
    for kind, number in kinds.items():
        assert value("serving_tokens_total", tenant="acme", model="nano", kind=kind) == number
    assert value("serving_pages_total", tenant="acme", model="nano", mode="tiny") == 2
    assert value("serving_pages_total", tenant="acme", model="nano", mode="base") == 1
    assert value("serving_cost_dollars_total", tenant="acme", model="nano") == pytest.approx(0.0000401)
    assert value("serving_time_to_first_token_seconds_sum", model="nano") == 2
    assert value("serving_inter_token_latency_seconds_sum", model="nano") == pytest.approx(0.1)
    assert value("serving_request_duration_seconds_sum", model="nano", priority="high") == 12
    assert value("serving_queue_wait_seconds_sum", model="nano", priority="high") == 0.5
    assert value("serving_retries_total", model="nano") == 2


def test_a_whole_answer_has_no_first_token() -> None:
    value = count(dataclasses.replace(RECORD, is_stream=False))
    assert value("serving_time_to_first_token_seconds_count", model="nano") is None
    assert value("serving_request_duration_seconds_count", model="nano", priority="high") == 1


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    value = count(dataclasses.replace(RECORD, tokens=TokenCounts(num_completion_tokens=1)))
    assert value("serving_time_to_first_token_seconds_count", model="nano") == 1
    assert value("serving_inter_token_latency_seconds_count", model="nano") is None


def test_a_refusal_is_counted_with_its_reason_and_nothing_else() -> None:
    refused = dataclasses.replace(RECORD, outcome=Outcome.REFUSED, status=429, error_code="rate_limit_exceeded")
    value = count(refused, refused)
    assert value("serving_refusals_total", tenant="acme", reason="rate_limit_exceeded") == 2
    assert value("serving_tokens_total", tenant="acme", model="nano", kind="prompt") is None
    assert value("serving_queue_wait_seconds_count", model="nano", priority="high") is None


def test_an_abort_is_counted_with_its_tokens_but_not_its_times() -> None:
    value = count(dataclasses.replace(RECORD, outcome=Outcome.ABORTED, status=499))
    assert value("serving_tokens_total", tenant="acme", model="nano", kind="completion") == 101
    assert value("serving_request_duration_seconds_count", model="nano", priority="high") is None
    assert value("serving_pages_total", tenant="acme", model="nano", mode="tiny") is None


def test_state_is_read_at_every_scrape() -> None:
    readings = [(catalogue.QUEUE_REQUESTS, ("nano", "high"), 3.0)]
    metrics = RouterMetrics(lambda: readings)
    key = ("serving_queue_requests", (("model", "nano"), ("priority", "high")))
    assert scrape(metrics)[key] == 3
    readings[0] = (catalogue.QUEUE_REQUESTS, ("nano", "high"), 1.0)
    assert scrape(metrics)[key] == 1


def test_the_versions_are_told() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("serving", "ray")}
    assert count()("serving_build_info", version=versions["serving"], ray=versions["ray"]) == 1
