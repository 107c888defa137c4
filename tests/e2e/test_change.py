"""A running stack changes, loses parts and ends, from other terminals and under load; with scripted engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from e2e.conftest import free_port
from e2e.scripted_stack import (
    SERVING,
    Clients,
    ScriptedStack,
    build_scripted_stack,
    run_scripted_stack,
    wait_for_replicas,
    wait_until,
)

# Each starts a stack of its own; what most changes come to is seen in test_keys_and_doors, test_scaling, test_faults.
pytestmark = pytest.mark.slow

SCRIPT = {"tokens_per_s": 100, "output_tokens": 50}


QUESTION = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, orjson.dumps(body), headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = orjson.loads(answer.read())
    return found


def ask(stack: ScriptedStack) -> dict[str, Any]:
    return post(f"{stack.url}/v1/chat/completions", QUESTION)


def pids(stack: ScriptedStack, name: str) -> set[int]:
    """Replicas by the name that Serve gives their processes."""
    return {process.pid for process in stack.find(f"ServeReplica:{name}")}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[ScriptedStack]:
    with run_scripted_stack(tmp_path, SCRIPT) as stack:
        yield stack


async def run(stack: ScriptedStack, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(stack.command, *arguments)


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_replacing_every_replica_under_load_fails_no_request(tmp_path: Path, num_replicas: int) -> None:
    with run_scripted_stack(tmp_path, SCRIPT, model={"num_replicas": num_replicas}) as stack:
        before, routers = pids(stack, "engine-m"), pids(stack, "router")
        clients = Clients(stack.url, 8, 50)
        async with clients.at_work():
            await asyncio.sleep(1)
            stack.write(script={**SCRIPT, "output_tokens": 51})
            done = await run(stack, "reload", "--config", str(stack.config))
            await asyncio.sleep(1)
        after = pids(stack, "engine-m")
        assert (done.returncode, done.stderr) == (0, ""), stack.log
        assert not clients.failures
        assert clients.num_done > 16
        assert len(after) == num_replicas
        assert not after & before
        assert pids(stack, "router") == routers, "nothing of theirs has changed"
        assert "are in force" in stack.log


async def test_a_price_changes_routers_under_load_and_no_engine(stack: ScriptedStack) -> None:
    before = pids(stack, "engine-m")
    assert ask(stack)["usage"]["estimated_cost"] < 1e-3
    routers = pids(stack, "router")
    clients = Clients(stack.url, 8, 20)
    async with clients.at_work():
        stack.write(price={"output_per_million": "1000"})
        stack.running.send_signal(signal.SIGHUP)
        await asyncio.to_thread(wait_until, lambda: "are in force" in stack.log, 60, "the new settings are in force")
    assert not clients.failures
    assert not pids(stack, "router") & routers
    assert ask(stack)["usage"]["estimated_cost"] >= 2e-3
    assert pids(stack, "engine-m") == before


async def test_settings_that_cannot_be_used_are_refused_and_the_old_ones_stay(stack: ScriptedStack) -> None:
    before = pids(stack, "engine-m"), pids(stack, "router")
    good = stack.config.read_text()
    for bad, reason in (
        ("models: [", "is not YAML"),
        (good.replace("report_s", "reprot_s"), "router.reprot_s: unknown key"),
        (good.replace(f"port: {stack.port}", f"port: {free_port()}"), "router.port cannot change"),
        (good.replace("cpus_per_replica: 0.1\n    script", "cpus_per_replica: 900\n    script"), "CPUs"),
        (good.replace("output_tokens: 50", "failures: [nonsense]"), "nonsense"),
    ):
        assert bad != good, reason
        stack.config.write_text(bad)
        done = await run(stack, "reload", "--config", str(stack.config))
        assert done.returncode == 1, done.stdout
        assert reason in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert ask(stack)["model"] == "m"
    assert pids(stack, "engine-m") == before[0]
    stack.config.write_text(good)
    assert (await run(stack, "reload", "--config", str(stack.config))).returncode == 0


async def test_down_lets_running_requests_finish_and_says_when_nothing_runs(stack: ScriptedStack) -> None:
    stack.write()
    config = ("--config", str(stack.config))
    assert (Path(f"/tmp/serving-{os.getuid()}") / f"127.0.0.1-{stack.port}.json").stat().st_mode & 0o777 == 0o600
    everything = stack.descendants()
    clients = Clients(stack.url, 4, 50)  # half a second each
    async with clients.at_work():
        await asyncio.sleep(0.2)
        stopping = asyncio.create_task(run(stack, "down", *config))
        await asyncio.to_thread(wait_until, lambda: "running requests are finished" in stack.log, 10, "it heard")
        clients.end()
    done = await stopping
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("stopped\n")
    assert clients.num_done >= 4
    assert not clients.failures
    assert stack.running.wait(5) == 0
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert not alive, [process.cmdline() for process in alive]
    again = await run(stack, "down", *config)
    assert (again.returncode, again.stderr) == (1, "nothing runs\n")
    again = await run(stack, "reload", *config)
    assert (again.returncode, again.stderr) == (1, "nothing runs\n")


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
async def test_the_death_of_rays_head_ends_the_stack_with_the_reason(stack: ScriptedStack, name: str) -> None:
    everything = stack.descendants()
    (head,) = (process for process in everything if process.name() == name)
    head.kill()
    started_s = time.monotonic()
    wait_until(lambda: "Ray is lost" in stack.log, 5, "it noticed")
    assert stack.running.wait(30) == 1
    print(f"{name}: ended after {time.monotonic() - started_s:.1f} s")
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert not alive, [process.cmdline() for process in alive]


async def test_an_engine_that_has_died_gets_nothing_more_before_serve_replaces_it(tmp_path: Path) -> None:
    with run_scripted_stack(tmp_path, SCRIPT, model={"num_replicas": 2}) as stack:
        before = pids(stack, "engine-m")
        engine = stack.engines()[0]
        post(f"{engine}/script", {"failures": ["dead"]})
        with pytest.raises(urllib.error.HTTPError):
            post(f"{engine}/v1/chat/completions", QUESTION)
        gone_s = await wait_for_replicas(stack, 1, timeout_s=5)
        assert gone_s < 1.5, "Serve asks for its health every two seconds, and not at once"
        for _ in range(4):
            assert ask(stack)["model"] == "m"
        back_s = await wait_for_replicas(stack, 2, timeout_s=60)
        assert len(pids(stack, "engine-m") & before) == 1
    print(f"out after {gone_s:.1f} s, replaced after {back_s:.1f} s")


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster that is nobody's: its address. The stack has its token, and is told nothing of a mode."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with run_head(tmp_path_factory.mktemp("ray"), "token") as address:
        yield address


@contextlib.contextmanager
def run_head(folder: Path, auth_mode: str) -> Iterator[str]:
    """`ray start --head` while the context lasts; gives the cluster's address."""
    port = free_port()
    command = [str(SERVING.parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=4"]
    command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    with (folder / "log").open("wb") as out:
        # Sockets have short names, pytest's folders long ones.
        process = subprocess.Popen(
            [*command, f"--temp-dir=/tmp/ray-{port}"],
            stdout=out,
            stderr=out,
            env={**os.environ, "RAY_AUTH_MODE": auth_mode},
        )
    try:
        wait_until(lambda: "--block" in (folder / "log").read_text(), 60, "Ray has started")
        yield f"127.0.0.1:{port}"
    finally:
        everything = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for left in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        psutil.wait_procs(everything, timeout=10)
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


async def test_in_a_joined_cluster_one_replica_ends_before_the_next_and_requests_wait(
    head: str, tmp_path: Path
) -> None:
    """Nobody knows whether there is room for one more, so there is none ready for a while."""
    with run_scripted_stack(tmp_path, SCRIPT, ray={"address": head}) as stack:
        before = pids_anywhere("engine-m")
        clients = Clients(stack.url, 4, 50)
        async with clients.at_work():
            stack.write(script={**SCRIPT, "start_s": 1.0})
            reloading = asyncio.create_task(run(stack, "reload", "--config", str(stack.config)))
            gap_s = await wait_for_replicas(stack, 0, timeout_s=60)
            done = await reloading
            await wait_for_replicas(stack, 1, timeout_s=30)
            num_done = clients.num_done
            await asyncio.to_thread(wait_until, lambda: clients.num_done > num_done, 10, "they are served again")
        assert done.returncode == 0, done.stderr
        assert not clients.failures
        assert not pids_anywhere("engine-m") & before
        print(f"no replica from {gap_s:.1f} s after the reload on; {clients.num_done} requests")
        # The process that talks to Ray dies without a chance to clean up: what it has left is taken out through Ray.
        (stack_process,) = psutil.Process(stack.running.pid).children()
        stack_process.kill()
        assert stack.running.wait(15) == 1
        assert stack.log.endswith(f"serving down --config {stack.config} removes them\n")
        assert ask(stack)["model"] == "m"
        done = await run(stack, "down", "--config", str(stack.config))
        assert (done.returncode, done.stderr) == (0, "")
        with pytest.raises(urllib.error.URLError):
            ask(stack)
        done = await run(stack, "down", "--config", str(stack.config))
        assert (done.returncode, done.stderr) == (1, "nothing runs\n")


@pytest.mark.slow
def test_a_cluster_that_takes_anyone_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray start --head` makes one where there is no token: whoever reaches it runs code."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with run_head(tmp_path, "disabled") as address:
        stack = build_scripted_stack(tmp_path, SCRIPT, ray={"address": address})
        stack.write()
        refused = stack.command("up", "--config", str(stack.config))
    assert refused.returncode == 1
    (line,) = refused.stdout.splitlines()
    assert line.startswith(f"not started: the Ray cluster at {address} asks for no token")
    assert "ray.let_anyone_on_the_network_run_code: true" in line


def pids_anywhere(name: str) -> set[int]:
    """Replicas in a cluster that is not the command's own, so they are not its descendants."""
    return {p.pid for p in psutil.process_iter() if any(f"ServeReplica:{name}" in part for part in command_of(p))}


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
