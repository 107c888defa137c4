"""The second door of an engine replica in `inline` mode: the router's checks, on a port of their own.

The engine's own port stays what it is, for the stack itself: metrics and counts. Clients come through HAProxy to this
one. Who checks is given from outside: this room knows nothing of the router.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.directory import ReplicaRecord, RouterReport, ServiceRecord
from serving.http_server import HttpServer
from serving.settings import Settings
from serving.telemetry.exporter import MetricsServer
from serving.telemetry.targets import Group

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_POLL_S = 0.05


class CheckedApp(Protocol):
    """The engine's app behind the router's checks."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    @property
    def is_idle(self) -> bool: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def refresh(self) -> None: ...

    def tick(self) -> None: ...

    def report(self) -> RouterReport: ...

    def absorb(self, reports: tuple[RouterReport, ...]) -> None: ...

    def follow_services(self, services: tuple[ServiceRecord, ...]) -> None: ...

    def render_metrics(self) -> bytes: ...

    def list_targets(self) -> list[Group]: ...

    metrics_url: str


FindUsage = Callable[[str], dict[str, Any] | None]
BuildCheckedApp = Callable[[Settings, ASGIApp, FindUsage, Callable[[], ReplicaRecord]], CheckedApp]


class Entrance:
    """Serves the checked app and keeps it informed, from `start` to `close`."""

    def __init__(self, app: CheckedApp, settings: Settings, directory: ActorHandle, host: str) -> None:
        self._app = app
        self._directory = directory
        self._report_s = settings.router.report_s
        self._drain_s = settings.engine.drain_s
        self._server = HttpServer(app, host=host, port=0, drain_s=1, limits=settings.router.limits)
        self._metrics = MetricsServer(app.render_metrics, app.list_targets, host, settings.telemetry.metrics_key)
        app.metrics_url = self._metrics.url
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def is_well(self) -> bool:
        """Whether it listens and its app is kept informed."""
        is_serving = self._server.is_serving and self._metrics.is_serving
        return is_serving and not any(task.done() for task in self._tasks)

    async def start(self) -> None:
        await self._app.start()
        await self._server.start()
        await self._metrics.start()
        self._tasks = [asyncio.create_task(self._tick_forever()), asyncio.create_task(self._report_forever())]

    async def drain(self) -> None:
        """Wait until nothing waits or runs, `engine.drain_s` at most. The port stays open meanwhile."""
        deadline_s = time.monotonic() + self._drain_s
        while not self._app.is_idle and time.monotonic() < deadline_s:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        await self._server.stop()
        await self._metrics.stop()
        for task in self._tasks:
            task.cancel()
        await self._app.close()

    async def _tick_forever(self) -> None:
        while True:
            self._app.refresh()
            self._app.tick()
            await asyncio.sleep(_TICK_S)

    async def _report_forever(self) -> None:
        while True:
            try:
                self._app.absorb(await self._directory.exchange.remote(self._app.report()))
                self._app.follow_services(await self._directory.services.remote())
            except ray.exceptions.RayError as error:
                logger.warning("the replica directory cannot be reached, trying again: %s", error)
            await asyncio.sleep(self._report_s)
