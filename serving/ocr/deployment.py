"""The OCR service as a Ray Serve deployment: its host, and a task that registers it and follows the routers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application
from starlette.routing import BaseRoute

from serving.cluster.deployment_versions import ocr_version, with_version
from serving.http.addresses import http_url
from serving.ocr.host import OcrHost
from serving.ocr.reading.router_client import Routers
from serving.settings.base import ANY_ADDRESS
from serving.settings.stack import Settings
from serving.telemetry.logs import configure_logs

logger = logging.getLogger(__name__)

_NOTICE_S = 0.5
_MANY = 100_000

BuildPages = Callable[[], Sequence[BaseRoute]]
"""Builds the routes for browsers in the process that serves them."""


class OcrReplica:
    """The deployment's class. Each replica registers its own address with the directory."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, directory: ActorHandle, build_pages: BuildPages | None
    ) -> None:
        configure_logs(settings.log)
        self._directory = directory
        self._report_s = settings.router.report_s
        ocr = settings.ocr
        host, metrics_host = map(_resolve, (ocr.host, settings.telemetry.metrics_host))
        self._follows = ocr.router_url is None
        self._routers = Routers(ocr.router_url or _own_router(settings))
        pages = build_pages() if build_pages is not None else ()
        self._host = OcrHost(settings, self._routers, host, pages, metrics_host)
        await self._host.start()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._report()
        self._report_task = asyncio.create_task(self._report_forever())

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a service that raises.

        Raises:
            RuntimeError: the server, the reading of jobs or the registration has stopped.
        """
        if not self._host.is_well or self._report_task.done():
            raise RuntimeError("a part of the OCR service has stopped")

    async def __del__(self) -> None:
        """Called by Ray Serve before it stops the replica: deregister, then finish what is running."""
        self._report_task.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._directory.withdraw.remote(self._host.record.service_id)
        await asyncio.sleep(self._report_s + _NOTICE_S)
        await self._host.stop()

    async def _report_forever(self) -> None:
        while True:
            try:
                await self._report()
            except ray.exceptions.RayError as error:
                logger.warning("cannot reach the directory, retrying: %s", error)
            await asyncio.sleep(self._report_s)

    async def _report(self) -> None:
        reports = await self._directory.announce.remote(self._host.record)
        if self._follows:
            self._routers.update([report.url for report in reports if report.url])


def _resolve(host: str) -> str:
    return str(ray.util.get_node_ip_address()) if host == "auto" else host


def _own_router(settings: Settings) -> str:
    """The address of this node's routers, for as long as the directory lists none."""
    host = "127.0.0.1" if settings.router.host in ANY_ADDRESS else settings.router.host
    return http_url(host, settings.router.port)


def build_ocr_app(settings: Settings, directory: ActorHandle, build_pages: BuildPages | None = None) -> Application:
    """The Serve application of the OCR services."""
    ocr = settings.ocr
    deployment = serve.deployment(
        OcrReplica,
        name="ocr",
        num_replicas=ocr.num_replicas,
        max_ongoing_requests=_MANY,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=2 * settings.engine.drain_s + 30,
        graceful_shutdown_wait_loop_s=0.1,
        # A fixed port cannot be shared with the replica that is replaced.
        max_surge_percent=max(1, 100 // ocr.num_replicas) if ocr.port == 0 else 0,
        ray_actor_options={"num_cpus": ocr.cpus_per_replica, "resources": dict(ocr.resources_per_replica)},
    )
    return with_version(deployment, ocr_version(settings)).bind(settings, directory, build_pages)
