"""Every expression of the dashboards, asked of a real Prometheus that scrapes the real stack."""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest
from monitoring.prometheus import Prometheus, needs_prometheus
from render_dashboards import DASHBOARDS, RATE

from e2e.conftest import Stack
from e2e.pages import build_page, encode
from serving.cli.demo_metrics import build_config, free_port, run_prometheus

pytestmark = pytest.mark.timeout(600)
NAMES = [expression for panels in DASHBOARDS.values() for panel in panels for expression, _ in panel.queries]


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    config = build_config(targets_url=f"{stack.url}/metrics/targets", interval_s=1)
    with run_prometheus(config, tmp_path_factory.mktemp("prometheus"), free_port()) as url:
        yield Prometheus(url)


def send(client: openai.OpenAI) -> None:
    """A page, and a stream."""
    content = [{"type": "image_url", "image_url": {"url": encode(build_page())}}, {"type": "text", "text": "Free OCR."}]
    client.chat.completions.create(model="nano", messages=[{"role": "user", "content": content}], max_tokens=5)  # type: ignore[list-item, misc]
    for _ in client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        pass


@needs_prometheus
def test_no_panel_is_empty(stack: Stack, client: openai.OpenAI, prometheus: Prometheus) -> None:
    def is_scraped() -> bool:
        return {job for job, _ in prometheus.healthy_targets()} >= {"router", "engine"}

    prometheus.wait_for(is_scraped, 60, "router and engine are scraped")
    deadline_s = time.monotonic() + 240
    empty = NAMES
    while empty:  # rates need counters that have grown between two scrapes
        assert time.monotonic() < deadline_s, empty
        send(client)
        time.sleep(2)
        empty = [expression for expression in empty if not prometheus.query(expression.replace(RATE, "1m"))]
