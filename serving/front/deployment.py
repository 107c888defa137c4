"""The front as a Ray Serve deployment: an HAProxy process, and a task that puts the replica list into its slots."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application

from serving.errors import SettingsError
from serving.front.haproxy import Haproxy, HaproxyError
from serving.front.slots import Known
from serving.settings import Settings

logger = logging.getLogger(__name__)

_WATCH_S = 10.0
_RETRY_S = 0.5
_MANY = 100_000


class FrontReplica:
    """The class behind the deployment. Several on one machine share the port; the kernel spreads connections."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, directory: ActorHandle
    ) -> None:
        (self._model,) = settings.models
        self._reader = f"front-{uuid.uuid4().hex[:12]}"
        self._lease_s = settings.engine.lease_s
        self._directory = directory
        self._known = Known()
        # Serve runs this on the replica's own event loop, whose thread lives as long as the replica.
        self._settings = settings
        self._haproxy = Haproxy(settings)
        await self._haproxy.wait_until_listening()
        self._tasks = [asyncio.create_task(self._follow_directory()), asyncio.create_task(self._keep_running())]

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a front that raises.

        Raises:
            HaproxyError: HAProxy has died and cannot be started again, or no longer takes commands.
            RuntimeError: the replica list is no longer followed.
        """
        ended = [task for task in self._tasks if task.done()]
        if ended:
            raise RuntimeError(f"the front no longer follows its replicas or its HAProxy: {ended}")
        await self._haproxy.slots()

    async def __del__(self) -> None:
        """Called by Ray Serve before it ends the replica: take no more, finish what runs."""
        for task in self._tasks:
            task.cancel()
        await self._haproxy.stop()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._directory.leave.remote(self._reader)

    async def _keep_running(self) -> None:
        """Start HAProxy again when it has died: sooner than Serve would notice and replace the whole front."""
        while True:
            await asyncio.sleep(_RETRY_S)
            if self._haproxy.is_running:
                continue
            logger.error("HAProxy has died, starting it again")
            try:
                await self._haproxy.stop(is_at_once=True)
                self._haproxy = Haproxy(self._settings)
                await self._haproxy.wait_until_listening()
                await self._haproxy.steer(self._known.wanted(self._model))
            except (HaproxyError, OSError) as error:
                logger.error("HAProxy does not start: %s", error)

    async def _follow_directory(self) -> None:
        """Keep the slots in line with the list. Whatever cannot be reached leaves the last list in force."""
        while True:
            try:
                snapshot = await self._directory.watch.remote(self._known.snapshot.version, _WATCH_S, self._reader)
                known = self._known.follow(snapshot, time.monotonic(), self._lease_s)
                await self._haproxy.steer(known.wanted(self._model))
                self._known = known  # only now: a list that was not carried out is asked for again
            except (ray.exceptions.RayError, HaproxyError, OSError) as error:
                logger.warning("the replica list cannot be followed, trying again: %s", error)
                await asyncio.sleep(_RETRY_S)


def build_front_app(settings: Settings, directory: ActorHandle) -> Application:
    """The Serve application of the fronts: `router.num_replicas` of them.

    Raises:
        SettingsError: there is more than one model.
    """
    if len(settings.models) != 1:
        raise SettingsError("router.mode: inline serves one model only; use gateway for several")
    router = settings.router
    deployment = serve.deployment(
        FrontReplica,
        name="front",
        num_replicas=router.num_replicas,
        max_ongoing_requests=_MANY,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=settings.engine.drain_s + 30,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": router.cpus_per_replica, "resources": dict(router.resources_per_replica)},
    )
    return deployment.bind(settings, directory)
