"""The ledger beside what clients saw and what engines counted, with routers killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import pytest
import yaml

from e2e.conftest import ROOT
from e2e.scripted_stack import ScriptedStack, run_scripted_stack, wait_until

NUM_REQUESTS = 200
NUM_KILLS = 20
SCRIPT = {
    "tokens_per_s": 100,
    "prefill_tokens_per_s": 5000,
    "output_tokens": 40,
    "max_num_seqs": 16,
    "failures": ["die:after_tokens=5:every=17", "error:after_tokens=3:every=23", "status:503:every=29"],
}
PRICES = {"input_per_million": 3, "output_per_million": 10}


class Books:
    """The ledger's database, read as it is."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "ledger.db"

    def read(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(f"file:{self._file}?mode=ro", uri=True) as connection:
            return connection.execute(query).fetchall()


def routers(stack: ScriptedStack) -> list[psutil.Process]:
    return stack.find("ServeReplica:router")


def kill_one(stack: ScriptedStack) -> None:
    """SIGKILL to a router with requests in hand."""
    wait_until(lambda: kill_if_busy(stack), 60, "a router was busy")


def kill_if_busy(stack: ScriptedStack) -> bool:
    for router in routers(stack):
        with contextlib.suppress(psutil.NoSuchProcess):
            files = [Path(file.path) for file in router.open_files()]
            if any(_open(file.parent) for file in files if file.name == "open"):
                router.send_signal(signal.SIGKILL)
                return True
    return False


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> tuple[str, float] | None:
    """The request's id and cost when the answer came whole; None for those that leave, are refused or fail."""
    is_stream, leaves_s = bool(number % 2), None
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello " * (1 + number % 50)}]}
    body |= {"max_tokens": 5 + number % 30, "stream": is_stream, "ignore_eos": True}
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    if number % 7 == 0:
        leaves_s = 0.02 + 0.01 * (number % 11)
    if number % 13 == 0:
        body["max_tokens"] = -1
    try:
        async with (
            asyncio.timeout(leaves_s),
            session.post(f"{url}/v1/chat/completions", json=body) as answer,
        ):
            text = await answer.text()
            if answer.status != 200 or (is_stream and not text.endswith("data: [DONE]\n\n")):
                return None
            if is_stream:
                text = text.strip().split("\n\n")[-2].removeprefix("data: ")
            found = orjson.loads(text)
            if "error" in found:
                return None
            return answer.headers["x-request-id"], found["usage"]["estimated_cost"]
    except (aiohttp.ClientError, TimeoutError):
        return None


async def ask_many(stack: ScriptedStack, numbers: Sequence[int], kill_at: Sequence[int]) -> list[tuple[str, float]]:
    """In order, a few at once; a router is killed before each of `kill_at`."""
    places = asyncio.Semaphore(24)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # the kernel chooses a router for each

    async def ask_one(number: int) -> tuple[str, float] | None:
        async with places:
            if number in kill_at:
                await asyncio.to_thread(kill_one, stack)
            return await ask(session, stack.url, number)

    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        return [found for found in await asyncio.gather(*map(ask_one, numbers)) if found is not None]


async def ask_while_killing(stack: ScriptedStack, num_kills: int) -> list[tuple[str, float]]:
    """Clients that ask all the time, while a busy router is killed as soon as both are there, so many times."""
    killing = asyncio.create_task(asyncio.to_thread(kill_many, stack, num_kills))
    numbers = itertools.count()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)

    async def ask_on() -> list[tuple[str, float]]:
        seen = []
        while not killing.done():
            found = await ask(session, stack.url, next(numbers))
            if found is None:
                await asyncio.sleep(0.05)  # nobody may listen just now
            else:
                seen.append(found)
        return seen

    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        found = await asyncio.gather(*(ask_on() for _ in range(16)))
    await killing
    return [each for part in found for each in part]


def kill_many(stack: ScriptedStack, number: int) -> None:
    for _ in range(number):
        wait_until(lambda: len(routers(stack)) >= 2, 120, "both routers were there")
        kill_one(stack)


def settle(stack: ScriptedStack, folder: Path, num_routers: int) -> None:
    """Until the dead routers' spools are adopted and all are there again."""

    def is_settled() -> bool:
        spools = list((folder / "spool").iterdir())
        journals = [file for spool in spools for file in spool.glob("*.journal") if file.stat().st_size]
        names = [spool.name for spool in spools]
        rows = {row[0] for row in Books(folder).read("SELECT DISTINCT router_id FROM requests")}
        return len(names) <= num_routers and not any(_open(spool) for spool in spools) and bool(rows or not journals)

    wait_until(lambda: len(routers(stack)) >= num_routers, 90, "the routers were there again")
    wait_until(is_settled, 90, f"the spools were adopted: {stack.log[-2000:]}")


def _open(spool: Path) -> bool:
    file = spool / "open"
    return file.exists() and any(file.read_bytes()[place : place + 4] != b"\0\0\0\0" for place in _places(file))


def _places(file: Path) -> range:
    return range(0, file.stat().st_size, 2048)


def reconcile(stack: ScriptedStack) -> str:
    """What the command prints; it must have found no difference."""
    rows = Books(stack.folder / "billing").read("SELECT DISTINCT replica_id FROM requests WHERE replica_id != ''")
    urls = {_replica_of(url): url for url in stack.engines()}
    assert {row[0] for row in rows} <= set(urls), "no replica is gone"
    arguments = [part for name, url in urls.items() for part in ("--replica", f"{name}={url}")]
    result = stack.command("billing", "reconcile", "--config", str(stack.config), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


_REPLICAS: dict[str, str] = {}


def _replica_of(url: str) -> str:
    return _REPLICAS[url]


async def learn_replicas(stack: ScriptedStack) -> None:
    """Which id listens where: the router's own state says it."""
    async with aiohttp.ClientSession() as session, session.get(f"{stack.url}/admin/state") as answer:
        state = await answer.json()
    for replica in state["replicas"]:
        _REPLICAS[replica["base_url"]] = replica["replica_id"]


def check_rows(folder: Path, seen: list[tuple[str, float]]) -> None:
    """Every answer that came whole has one row, completed, of that cost; and no row is there twice."""
    rows = {row[0]: row[1:] for row in Books(folder).read("SELECT request_id, outcome, cost_nanodollars FROM requests")}
    assert len(dict(seen)) == len(seen)
    for request_id, cost in seen:
        assert request_id in rows, f"{request_id} is lost"
        assert rows[request_id] == ("completed", round(cost * 1e9)), request_id
    total = Books(folder).read("SELECT sum(cost_nanodollars), sum(num_requests) FROM months")
    assert total == [(sum(row[1] for row in rows.values()), len(rows))], "the months' sums are those of the rows"


def check_outcomes(folder: Path) -> Counter[str]:
    """Requests have ended in every way there is, one of them with its router."""
    outcomes = Counter(dict(Books(folder).read("SELECT outcome, count(*) FROM requests GROUP BY 1")))
    lost = Books(folder).read("SELECT count(*) FROM requests WHERE error_code = 'router_lost'")
    print(outcomes, lost)
    for outcome in ("completed", "aborted", "failed", "refused"):
        assert outcomes[outcome], outcome
    assert lost[0][0], "the killed router had something in hand"
    return outcomes


def start(
    folder: Path, script: dict[str, Any] | None, num_replicas: int, num_routers: int, **more: Any
) -> AbstractContextManager[ScriptedStack]:
    billing = {"directory": str(folder / "billing"), "flush_s": 0.2, "spool": {"adopt_s": 0.5}}
    model = {"num_replicas": num_replicas, "price": PRICES, **more}
    return run_scripted_stack(folder, script, model=model, router={"num_replicas": num_routers}, billing=billing)


async def test_engines_and_ledger_agree_after_aborts_failures_and_a_killed_router(tmp_path: Path) -> None:
    with start(tmp_path, SCRIPT, 2, 2) as stack:
        await learn_replicas(stack)
        seen = await ask_many(stack, range(NUM_REQUESTS), kill_at=(NUM_REQUESTS // 2,))
        await asyncio.to_thread(settle, stack, tmp_path / "billing", 2)
        printed = await asyncio.to_thread(reconcile, stack)
        print(printed)
        check_rows(tmp_path / "billing", seen)
        outcomes = check_outcomes(tmp_path / "billing")
        report = stack.command("billing", "report", "--config", str(stack.config), "--by", "outcome", "-f", "json")
        assert json.loads(report.stdout)["total"]["num_requests"] == sum(outcomes.values())
        print(stack.command("billing", "report", "--config", str(stack.config), "--by", "day,model,outcome").stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_vllm_and_ledger_agree_after_aborts_and_a_killed_router(tmp_path: Path) -> None:
    local = yaml.safe_load((ROOT / "configs/local.yaml").read_text())["models"]["nano"]
    model = {name: local[name] for name in ("checkpoint", "cpus_per_replica", "engine_args", "env")}
    with start(tmp_path, None, 1, 2, **model) as stack:
        await learn_replicas(stack)
        seen = await ask_many(stack, range(NUM_REQUESTS), kill_at=(NUM_REQUESTS // 2,))
        await asyncio.to_thread(settle, stack, tmp_path / "billing", 2)
        print(await asyncio.to_thread(reconcile, stack))
        check_rows(tmp_path / "billing", seen)
        check_outcomes(tmp_path / "billing")


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_a_router_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    script = {**SCRIPT, "failures": []}
    with start(tmp_path, script, 1, 2) as stack:
        await learn_replicas(stack)
        seen = await ask_while_killing(stack, NUM_KILLS)
        assert len(seen) > NUM_KILLS, "clients were served between the kills"
        await asyncio.to_thread(settle, stack, tmp_path / "billing", 2)
        check_rows(tmp_path / "billing", seen)
        print(await asyncio.to_thread(reconcile, stack))
        print(
            len(seen),
            Books(tmp_path / "billing").read("SELECT outcome, error_code, count(*) FROM requests GROUP BY 1, 2"),
        )
