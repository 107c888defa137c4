"""The router as a Ray Serve deployment: the app on a port of its own, and tasks that keep it up to date."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import Awaitable, Callable

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application
from starlette.types import ASGIApp

from serving.cluster.deployment_versions import router_version, with_version
from serving.cluster.directory import EMPTY, Snapshot
from serving.errors import SettingsError
from serving.http.addresses import http_url
from serving.http.draining import Drainable
from serving.http.server import HttpServer
from serving.router.app import RouterApp
from serving.settings.base import ANY_ADDRESS
from serving.settings.router import RouterSettings
from serving.settings.stack import Settings
from serving.telemetry.exporter import MetricsServer
from serving.telemetry.logs import configure_logs
from serving.telemetry.targets import TargetsFile

logger = logging.getLogger(__name__)

_WATCH_S = 10.0
_RETRY_S = 0.5
_TICK_S = 0.5
_MANY = 100_000
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"
_SERVES_CONNECTIONS = 4096  # HAProxy's default in Serve
_SPARE_FILES = 100


class RouterReplica:
    """The class behind the deployment. Replicas on one machine share the port; the kernel distributes connections."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, directory: ActorHandle
    ) -> None:
        configure_logs(settings.log)
        if settings.router.behind_serve:
            max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            check_open_files(int(os.environ.get(_CONNECTIONS, _SERVES_CONNECTIONS)), max_files)
        self._directory = directory
        self._reader = serve.get_replica_context().replica_id.unique_id
        self._report_s = settings.router.report_s
        self._snapshot: Snapshot = EMPTY
        self._app = RouterApp(settings, read_snapshot=lambda: self._snapshot, has_ledger=True)
        self._drainable = Drainable(self._app)
        self._drain_s = settings.engine.drain_s
        self._server = None if settings.router.behind_serve else self._open_port(settings.router)
        await self._app.start()
        telemetry = settings.telemetry
        host = ray.util.get_node_ip_address() if telemetry.metrics_host == "auto" else telemetry.metrics_host
        self._metrics = MetricsServer(self._app.render_metrics, self._app.list_targets, host, telemetry.metrics_key)
        await self._metrics.start()
        self._app.metrics_url = self._metrics.url
        self._app.url = _reachable_url(settings.router.host, settings.router.port)
        file = settings.telemetry.targets_file
        self._targets_file = TargetsFile(file) if file is not None else None
        with contextlib.suppress(ray.exceptions.RayError):  # learn the replicas before the first request
            await self._follow(timeout_s=0.0)
            await self._report()
        if self._server is not None:
            await self._server.start()
        self._tasks = [
            asyncio.create_task(_repeat(step, pause_s))
            for step, pause_s in ((self._follow, 0.0), (self._report, self._report_s), (self._tick, _TICK_S))
        ]

    def _open_port(self, router: RouterSettings) -> HttpServer:
        return HttpServer(
            self._drainable,
            host=router.host,
            port=router.port,
            drain_s=self._drain_s,
            shares_port=True,
            limits=router.limits,
        )

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a router whose check raises.

        Raises:
            RuntimeError: the HTTP server or one of the tasks has ended.
        """
        if not (self._metrics.is_serving and (self._server is None or self._server.is_serving)):
            raise RuntimeError("the router's HTTP server has ended")
        ended = [task for task in self._tasks if task.done()]
        if ended:
            raise RuntimeError(f"the router is no longer kept informed: {ended}")

    async def __del__(self) -> None:
        """Called by Ray Serve before it ends the replica: clients are sent elsewhere, requests in flight are
        finished."""
        await self._drainable.drain(self._drain_s)
        if self._server is not None:
            await self._server.stop()
        await self._metrics.stop()
        for task in self._tasks:
            task.cancel()
        await self._app.close()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._report()  # reports that there is no more work here, and the tenants' last totals
            await self._directory.leave.remote(self._reader)

    async def _follow(self, timeout_s: float = _WATCH_S) -> None:
        """Wait for the next change of the replica list. While the directory is unavailable the last list stays in
        force."""
        snapshot = await self._directory.watch.remote(self._snapshot.version, timeout_s, self._reader)
        if snapshot.version != self._snapshot.version:
            self._snapshot = snapshot
            self._app.refresh()

    async def _report(self) -> None:
        self._app.absorb(await self._directory.exchange.remote(self._app.report()))
        self._app.follow_services(await self._directory.services.remote())
        if self._targets_file is not None:
            try:
                await asyncio.to_thread(self._targets_file.write, self._app.list_targets())
            except OSError as error:
                logger.warning("the file of scrape targets cannot be written: %s", error)

    async def _tick(self) -> None:
        self._app.tick()


def _reachable_url(host: str, port: int) -> str:
    """Where this router is reached from other nodes too, if from anywhere."""
    host = ray.util.get_node_ip_address() if host in ANY_ADDRESS else host
    return http_url(host, port)


async def _repeat(step: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Repeat a step forever, also while the directory cannot be reached."""
    while True:
        try:
            await step()
            await asyncio.sleep(pause_s)
        except ray.exceptions.RayError as error:
            logger.warning("the replica directory cannot be reached, trying again: %s", error)
            await asyncio.sleep(_RETRY_S)


@serve.ingress()
class ServedRouterReplica(RouterReplica):
    """The same on a port assigned by Ray Serve, behind the HAProxy that Serve runs on every node."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._drainable


def check_open_files(max_connections: int, max_files: int) -> None:
    """Check that Ray Serve's HAProxy, which runs beside every router, can start: it opens a file for each end of a
    connection, and pipes for one in four. If it may not, it exits at once and reports the reason in its own log only.

    Raises:
        SettingsError: too few open files are allowed.
    """
    needed = 5 * max_connections // 2 + _SPARE_FILES
    if resource.RLIM_INFINITY != max_files < needed:
        raise SettingsError(
            f"{_CONNECTIONS}={max_connections} needs {needed} open files, and {max_files} are allowed here: raise "
            "`ulimit -Hn` of Ray's nodes, or lower it"
        )


def build_router_app(settings: Settings, directory: ActorHandle) -> Application:
    """The routers' Serve application. Deploying it again replaces routers only if their settings differ.

    Raises:
        SettingsError: the settings put routers behind Ray Serve's HAProxy, but Ray was started without it.
    """
    router = settings.router
    if router.behind_serve and os.environ.get(_HAPROXY) != "1":
        raise SettingsError(f"router.behind_serve needs {_HAPROXY}=1 in the environment of every node of Ray's")
    num_replicas = router.num_replicas
    deployment = serve.deployment(
        ServedRouterReplica if router.behind_serve else RouterReplica,
        name="router",
        num_replicas=num_replicas,
        max_ongoing_requests=_MANY,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=2 * settings.engine.drain_s
        + 30,  # for requests in flight and those that arrive meanwhile
        graceful_shutdown_wait_loop_s=0.1,
        # The port is shared, so a new router listens beside the one that it replaces. Without room for one more the old
        # ones stay, which is better than none.
        max_surge_percent=max(1, 100 // num_replicas),
        ray_actor_options={"num_cpus": router.cpus_per_replica, "resources": dict(router.resources_per_replica)},
    )
    return with_version(deployment, router_version(settings)).bind(settings, directory)
