"""A replica without Ray around it: the real engine's stand-in, the real HTTP server, the directory in this process."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve

from serving.cluster.directory import EMPTY, ReplicaRecord, ReplicaState
from serving.cluster.directory_actor import ReplicaDirectory
from serving.engine import replica as replica_module
from serving.engine.replica import EngineReplica, EngineStartError, build_engine_app
from serving.settings.stack import AutoscalingSettings, EngineSettings, ModelSettings, ScriptSettings, Settings

QUESTION = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


class Replica(EngineReplica):
    """Serve calls `__del__` and awaits it; so does Python, and does not."""

    leave = EngineReplica.__del__

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Handle:
    """Ray's handle of the directory's actor."""

    def __init__(self, directory: ReplicaDirectory) -> None:
        self._directory = directory

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._directory, name))


class Stand:
    """A replica on its stand."""

    def __init__(self, directory: ReplicaDirectory, replica: Replica) -> None:
        self.directory = directory
        self.replica = replica

    async def record(self) -> ReplicaRecord | None:
        snapshot = await self.directory.watch(EMPTY.version, 0)
        return snapshot.records[0] if snapshot.records else None

    async def is_running(self) -> None:
        """Wait until the engine runs a request."""
        record = await self.record()
        assert record is not None
        headers = {"authorization": "Bearer sesame"}
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http, asyncio.timeout(30):
            while True:
                metrics = (await http.get(f"{record.base_url}/metrics", headers=headers)).text
                if re.search(r"^vllm:num_requests_running\{.*\} 1\.0$", metrics, re.MULTILINE):
                    return
                await asyncio.sleep(0.01)

    async def ask(self, **body: Any) -> httpx.Response:
        record = await self.record()
        assert record is not None
        headers = {"authorization": "Bearer sesame", **body.pop("headers", {})}
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            url = f"{record.base_url}/v1/chat/completions"
            return await http.post(url, json={**QUESTION, **body}, headers=headers)


Start = Callable[..., Awaitable[Stand]]


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    directory = ReplicaDirectory(lease_s=60)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module, "reach_directory", lambda *_: Handle(directory))
    monkeypatch.setattr(replica_module, "_USAGE_S", 0.3)
    started: list[Replica] = []

    async def start(drain_s: float = 10, **script: Any) -> Stand:
        engine = EngineSettings.model_validate({"drain_s": drain_s, "heartbeat_s": 0.05, "api_key": "sesame"})
        model = ModelSettings(checkpoint="x", aliases=("n",), script=ScriptSettings(**script))
        replica = Replica.__new__(Replica)
        await replica.__init__("m", Settings(models={"m": model}, engine=engine), "x")  # type: ignore[misc]
        started.append(replica)
        stand = Stand(directory, replica)
        async with asyncio.timeout(30):
            while True:  # until the next heartbeat has told that it is ready
                record = await stand.record()
                if record is not None and record.state is ReplicaState.READY:
                    return stand
                await asyncio.sleep(0.01)

    yield start
    for replica in started:
        await replica.leave()


async def test_it_tells_what_it_can_do_and_serves_under_every_name(start: Start) -> None:
    stand = await start(kv_tokens=777, max_num_seqs=5, max_model_len=99)
    record = await stand.record()
    assert record is not None
    assert (record.replica_id, record.model, record.state) == ("r1", "m", ReplicaState.READY)
    assert (record.capacity_tokens, record.max_num_seqs, record.max_model_len) == (777, 5, 99)
    for model in ("m", "n"):
        assert (await stand.ask(model=model, max_tokens=1)).status_code == 200
    assert (await stand.ask(headers={"authorization": "Bearer no"})).status_code == 401
    await stand.replica.check_health()


async def test_its_usage_asks_for_the_engines_key(start: Start) -> None:
    stand = await start()
    await stand.ask(max_tokens=3, headers={"x-request-id": "a"})
    record = await stand.record()
    assert record is not None
    async with httpx.AsyncClient(trust_env=False, base_url=record.base_url) as http:
        assert (await http.get("/usage/a")).status_code == 401
        http.headers["authorization"] = "Bearer sesame"
        found = (await http.get("/usage/a")).json()
        assert (found["completion_tokens"], found["is_finished"]) == (3, True)
        totals = (await http.get("/usage")).json()
        assert (totals["completion_tokens"], totals["requests"]) == (3, 1)


async def test_a_replica_that_drains_is_known_to_before_it_refuses_and_finishes_what_runs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "_USAGE_S", 3)
    stand = await start(tokens_per_s=20)
    seen = await stand.directory.watch(EMPTY.version, 0, "router")
    running = asyncio.create_task(stand.ask(max_tokens=20))
    await stand.is_running()
    hearing = asyncio.create_task(stand.directory.watch(seen.version, 60, "router"))
    await asyncio.sleep(0.01)
    leaving = asyncio.create_task(stand.replica.leave())
    heard = await hearing
    assert heard.records[0].state is ReplicaState.DRAINING
    assert (await stand.ask(max_tokens=1)).status_code == 200, "a router that has not acted on it is still served"
    await stand.directory.watch(heard.version, 0, "router")
    assert (await running).status_code == 200
    assert (await stand.ask(max_tokens=1)).status_code == 200, "its usage can still be asked for"
    await leaving
    assert await stand.record() is None
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(trust_env=False) as http:
            await http.get(heard.records[0].base_url)


async def test_what_runs_too_long_is_cut(start: Start) -> None:
    stand = await start(tokens_per_s=1, drain_s=0.2)
    running = asyncio.create_task(stand.ask(max_tokens=60))
    await stand.is_running()
    async with asyncio.timeout(15):
        await stand.replica.leave()
        with contextlib.suppress(httpx.HTTPError):
            assert (await running).status_code >= 500


async def test_an_idle_replica_ends_at_once(start: Start) -> None:
    stand = await start()
    started_s = time.monotonic()
    await stand.replica.leave()
    assert time.monotonic() - started_s < 2


async def test_an_engine_that_dies_is_told_at_once_and_fails_its_health(start: Start) -> None:
    stand = await start(failures=("dead",))
    assert (await stand.ask()).status_code == 500
    async with asyncio.timeout(10):  # its lease lasts for a minute
        while await stand.record() is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert await stand.record() is None, "no heartbeat brings it back"
    with pytest.raises(RuntimeError, match="the engine of r1 has died"):
        await stand.replica.check_health()


async def test_a_script_that_makes_no_sense_ends_the_start(start: Start) -> None:
    with pytest.raises(EngineStartError, match="nonsense"):
        await start(failures=("nonsense",))


@pytest.mark.parametrize("scaling", [None, AutoscalingSettings(min_replicas=2, max_replicas=4)])
def test_a_deployment_has_a_fixed_number_of_replicas_or_scales(scaling: AutoscalingSettings | None) -> None:
    model = ModelSettings(checkpoint="x", num_replicas=3, autoscaling=scaling)
    app: Any = build_engine_app("m", Settings(models={"m": model}), "x")
    deployment = app._bound_deployment
    config = deployment._deployment_config.autoscaling_config
    if scaling is None:
        assert (deployment.num_replicas, config) == (3, None)
    else:
        assert (config.min_replicas, config.max_replicas) == (2, 4)
    again: Any = build_engine_app("m", Settings(models={"m": model}), "x")
    assert again._bound_deployment.version == deployment.version, "nothing has changed"
