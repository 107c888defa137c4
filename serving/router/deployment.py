"""The router as a Ray Serve deployment: the app on a port of its own, and a task that follows the replica list."""

from __future__ import annotations

import asyncio
import logging

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application

from serving.directory import EMPTY, Snapshot
from serving.http_server import HttpServer
from serving.router.app import RouterApp
from serving.settings import Settings

logger = logging.getLogger(__name__)

_WATCH_S = 10.0
_RETRY_S = 0.5
_MANY = 100_000


class RouterReplica:
    """The class behind the deployment. Several on one machine share the port; the kernel spreads connections."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, directory: ActorHandle
    ) -> None:
        self._directory = directory
        self._snapshot: Snapshot = EMPTY
        self._app = RouterApp(settings, read_snapshot=lambda: self._snapshot)
        router = settings.router
        self._server = HttpServer(
            self._app, host=router.host, port=router.port, drain_s=settings.engine.drain_s, shares_port=True
        )
        await self._app.start()
        await self._server.start()
        self._following = asyncio.create_task(self._follow_directory())

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a router that raises.

        Raises:
            RuntimeError: nothing listens any more, or the replica list is no longer followed.
        """
        if not self._server.is_serving:
            raise RuntimeError("the router's HTTP server has ended")
        if self._following.done():
            raise RuntimeError(f"the replica list is no longer followed: {self._following}")

    async def __del__(self) -> None:
        """Called by Ray Serve before it ends the replica: take no more, finish what runs."""
        await self._server.stop()
        self._following.cancel()
        await self._app.close()

    async def _follow_directory(self) -> None:
        """Keep the list fresh. A directory that cannot be reached leaves the last list in force."""
        while True:
            try:
                self._snapshot = await self._directory.watch.remote(self._snapshot.version, _WATCH_S)
            except ray.exceptions.RayError as error:
                logger.warning("the replica directory cannot be reached, trying again: %s", error)
                await asyncio.sleep(_RETRY_S)


def build_router_app(settings: Settings, directory: ActorHandle) -> Application:
    """The Serve application of the routers."""
    deployment = serve.deployment(
        RouterReplica,
        name="router",
        num_replicas=settings.router.num_replicas,
        max_ongoing_requests=_MANY,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=settings.engine.drain_s + 30,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": settings.router.cpus_per_replica},
    )
    return deployment.bind(settings, directory)
