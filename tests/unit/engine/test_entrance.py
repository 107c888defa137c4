from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from serving.directory import RouterReport, ServiceRecord
from serving.settings import EngineSettings, ModelSettings, Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from ray.exceptions import RayActorError

    from serving.engine.entrance import Entrance


class App:
    """A checked app that answers at once and notes what it is told."""

    def __init__(self) -> None:
        self.is_idle = True
        self.metrics_url = ""
        self.calls: list[str] = []
        self.others: tuple[RouterReport, ...] = ()
        self.services: tuple[ServiceRecord, ...] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def start(self) -> None:
        self.calls.append("start")

    async def close(self) -> None:
        self.calls.append("close")

    def refresh(self) -> None:
        self.calls.append("refresh")

    def tick(self) -> None:
        self.calls.append("tick")

    def render_metrics(self) -> bytes:
        return b"a 1\n"

    def list_targets(self) -> list[Any]:
        return []

    def report(self) -> RouterReport:
        return RouterReport("mine")

    def absorb(self, reports: tuple[RouterReport, ...]) -> None:
        self.others = reports

    def follow_services(self, services: tuple[ServiceRecord, ...]) -> None:
        self.services = services


class Directory:
    """In the place of the actor's handle; its first answer is that it is away."""

    def __init__(self) -> None:
        self.exchange = self
        self.services = SimpleNamespace(remote=self._list_services)
        self.reports: list[RouterReport] = []

    async def remote(self, report: RouterReport) -> tuple[RouterReport, ...]:
        self.reports.append(report)
        if len(self.reports) == 1:
            raise RayActorError
        return (RouterReport("other"),)

    async def _list_services(self) -> tuple[ServiceRecord, ...]:
        return (ServiceRecord("ocr", "http://127.0.0.1:1"),)


@contextlib.asynccontextmanager
async def opened(drain_s: float = 5.0) -> AsyncIterator[tuple[Entrance, App, Directory]]:
    settings = Settings(
        models={"m": ModelSettings(checkpoint="nano")},
        engine=EngineSettings(drain_s=drain_s),
        router={"report_s": 0.05},  # type: ignore[arg-type]
    )
    app, directory = App(), Directory()
    handle: Any = directory
    entrance = Entrance(app, settings, handle, "127.0.0.1")
    await entrance.start()
    try:
        yield entrance, app, directory
    finally:
        await entrance.close()
        assert app.calls[-1] == "close"
        assert not entrance.is_well


async def test_it_serves_the_app_and_keeps_it_informed() -> None:
    async with opened() as (entrance, app, directory):
        assert entrance.is_well
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{entrance.port}/")).content == b"ok"
            assert (await client.get(app.metrics_url)).content == b"a 1\n"
        async with asyncio.timeout(5):
            while not app.services:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert app.calls[:3] == ["start", "refresh", "tick"]
        assert app.others == (RouterReport("other"),), "it goes on after the directory was away"
        assert app.services == (ServiceRecord("ocr", "http://127.0.0.1:1"),)
        assert set(directory.reports) == {RouterReport("mine")}


async def test_draining_waits_for_what_waits_or_runs() -> None:
    async with opened() as (entrance, app, _):
        app.is_idle = False
        draining = asyncio.create_task(entrance.drain())
        await asyncio.sleep(0.2)
        assert not draining.done()
        assert entrance.is_well, "the port stays open"
        app.is_idle = True
        async with asyncio.timeout(1):
            await draining


async def test_draining_has_an_end() -> None:
    async with opened(drain_s=0.1) as (entrance, app, _):
        app.is_idle = False
        async with asyncio.timeout(1):
            await entrance.drain()
