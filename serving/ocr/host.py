"""One OCR service on its own port, in a Serve replica or as a command."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.routing import BaseRoute

from serving.cluster.directory import ServiceRecord
from serving.http.addresses import http_url
from serving.http.draining import Drainable
from serving.http.server import HttpServer
from serving.ocr.api.app import OcrApp
from serving.ocr.api.service import OcrService
from serving.ocr.reading.router_client import Routers
from serving.ocr.rendering.fonts import warn_of_missing_fonts
from serving.settings.stack import Settings
from serving.telemetry.exporter import MetricsServer


class OcrHost:
    """Starts the service, and stops it without losing what is running."""

    def __init__(
        self,
        settings: Settings,
        routers: Routers,
        host: str,
        pages: Sequence[BaseRoute] = (),
        metrics_host: str | None = None,
    ) -> None:
        """Bind the addresses.

        Args:
            settings: of the whole stack.
            routers: where pages are sent to.
            host: address to listen on.
            pages: routes for browsers.
            metrics_host: address of the metrics port; None takes the one in the settings, which must not be `auto`.

        Raises:
            OSError: the address is in use or is not this machine's.
            SettingsError: the secret cannot be read or created.
        """
        self._drain_s = settings.engine.drain_s
        self.service = OcrService(settings, routers)
        self._drainable = Drainable(OcrApp(self.service, pages))
        limits = settings.router.limits
        self._server = HttpServer(
            self._drainable, host=host, port=settings.ocr.port, drain_s=self._drain_s, limits=limits
        )
        telemetry = settings.telemetry
        self._metrics = MetricsServer(
            self.service.metrics.render, list, metrics_host or telemetry.metrics_host, telemetry.metrics_key
        )
        self.record = ServiceRecord(
            self.service.service_id,
            http_url(host, self._server.port),
            self._metrics.url,
        )

    @property
    def port(self) -> int:
        return self._server.port

    async def start(self) -> None:
        """Must run inside the event loop that serves."""
        await asyncio.to_thread(warn_of_missing_fonts)
        await self.service.start()
        await self._metrics.start()
        await self._server.start()

    @property
    def is_well(self) -> bool:
        return self._server.is_serving and self._metrics.is_serving and self.service.runner.is_well

    async def stop(self) -> None:
        """Finish answers that have started; jobs continue at other services."""
        self.service.runner.stop_taking()
        await self._drainable.drain(self._drain_s)
        await self._server.stop()
        await self.service.close(self._drain_s)
        await self._metrics.stop()
