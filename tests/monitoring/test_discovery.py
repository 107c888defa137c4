"""A real Prometheus follows routers and engine replicas as they come and go, and counts each request once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from e2e.scripted_stack import ScriptedStack, run_scripted_stack, wait_until

from monitoring.prometheus import Prometheus, needs_prometheus
from serving.cli.demo_metrics import build_config, free_port, run_prometheus

SCRIPT = {"tokens_per_s": 500, "output_tokens": 10}
TOKENS = 7
JOBS = ("router", "engine")
ALL = "sum(max_over_time({}[10m]))"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedStack]:
    folder = tmp_path_factory.mktemp("discovery")
    billing = {"directory": str(folder / "billing"), "flush_s": 0.2, "spool": {"adopt_s": 0.5}}
    sections = {"router": {"num_replicas": 2}, "telemetry": {"targets_file": str(folder / "targets.json")}}
    with run_scripted_stack(folder, SCRIPT, model={"num_replicas": 2}, billing=billing, **sections) as stack:
        yield stack


async def ask(url: str, number: int) -> None:
    """Requests over connections of their own, so that the kernel gives each router some."""
    connector = aiohttp.TCPConnector(limit=8, force_close=True)
    body = {"model": "m", "max_tokens": TOKENS, "messages": [{"role": "user", "content": "Hello"}]}

    async def one(session: aiohttp.ClientSession, is_stream: bool) -> None:
        async with session.post(f"{url}/v1/chat/completions", json={**body, "stream": is_stream}) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(one(session, bool(i % 2)) for i in range(number)))


def kill_one(stack: ScriptedStack, name: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(stack.find(name)[0].pid, signal.SIGKILL)


def targets(stack: ScriptedStack) -> set[tuple[str, str]]:
    """As the file tells them."""
    groups: list[dict[str, Any]] = json.loads((stack.folder / "targets.json").read_text())
    return {
        (job, address) for group in groups for address in group["targets"] if (job := group["labels"]["job"]) in JOBS
    }


@needs_prometheus
async def test_what_comes_and_goes_is_followed_and_counted_once(stack: ScriptedStack, tmp_path: Path) -> None:
    by_http = build_config(targets_url=f"{stack.url}/metrics/targets", interval_s=1)
    by_file = build_config(targets_file=stack.folder / "targets.json", interval_s=1)
    (tmp_path / "http").mkdir()
    (tmp_path / "file").mkdir()
    with (
        run_prometheus(by_http, tmp_path / "http", free_port()) as http_url,
        run_prometheus(by_file, tmp_path / "file", free_port()) as file_url,
    ):
        pair = [Prometheus(http_url), Prometheus(file_url)]
        await asyncio.to_thread(follow, stack, pair, 4, set())
        before = targets(stack)
        sent = 0
        for victim in ("ServeReplica:router", "ServeReplica:engine-m", None):
            await ask(stack.url, 40)
            sent += 40
            await asyncio.to_thread(expect, pair, sent)
            if victim is not None:
                kill_one(stack, victim)
                await asyncio.to_thread(follow, stack, pair, 4, before)
                before = targets(stack)


def follow(stack: ScriptedStack, pair: list[Prometheus], number: int, before: set[tuple[str, str]]) -> None:
    """Until others are there than before, and each Prometheus scrapes them all."""
    wait_until(lambda: bool(targets(stack) - before), 60, "one has come")
    for prometheus in pair:
        prometheus.wait_for(
            lambda prometheus=prometheus: (  # type: ignore[misc]
                len(targets(stack)) == number
                and {target for target in prometheus.healthy_targets() if target[0] in JOBS} == targets(stack)
            ),
            90,
            "every process is scraped, and no other",
        )


def expect(pair: list[Prometheus], sent: int) -> None:
    """All that were sent are counted, each once, by routers and by engines, and nothing has gone backwards."""
    for prometheus in pair:
        for metric, expected in (
            ('serving_requests_total{outcome="completed"}', sent),
            ('serving_tokens_total{kind="completion"}', sent * TOKENS),
            ("vllm:generation_tokens_total", sent * TOKENS),
            ("vllm:request_success_total", sent),
            ("serving_request_duration_seconds_count", sent),
        ):
            prometheus.wait_for(
                lambda metric=metric, expected=expected: prometheus.value(ALL.format(metric)) >= expected,  # type: ignore[misc] # noqa: B023
                30,
                f"{metric} is {expected}",
            )
            assert prometheus.value(ALL.format(metric)) == expected, metric
        counters = prometheus.query('count by (__name__) ({__name__=~"(serving_|vllm:).*_(total|count|sum|bucket)"})')
        assert counters
        for name in (found["metric"]["__name__"] for found in counters):
            assert prometheus.query(f"resets({name}[10m]) > 0") == []
