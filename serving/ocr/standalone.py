"""The OCR service as a command, for a router that runs elsewhere."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

from starlette.routing import BaseRoute

from serving.errors import SettingsError
from serving.ocr.host import OcrHost
from serving.ocr.reading.router_client import Routers
from serving.settings.stack import Settings
from serving.telemetry.logs import configure_logs


def run_service(settings: Settings, pages: Sequence[BaseRoute], say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        SettingsError: `ocr.router_url` is missing, or the secret cannot be read or created.
        OSError: the address is in use, or a folder cannot be used.
    """
    if settings.ocr.router_url is None:
        raise SettingsError("ocr.router_url is missing: set it, or --router, to the router that pages are sent to")
    configure_logs(settings.log)
    asyncio.run(_serve(settings, settings.ocr.router_url, pages, say))


async def _serve(settings: Settings, router_url: str, pages: Sequence[BaseRoute], say: Callable[[str], None]) -> None:
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    host = OcrHost(settings, Routers(router_url), settings.ocr.host, pages)
    await host.start()
    say(f"Ready on {host.record.url}/v1/ocr, pages go to {router_url} (metrics: {host.record.metrics_url})")
    if pages:
        say(f"In a browser: {host.record.url}/")
    await over.wait()
    say("stopping: finishing documents that clients are waiting for ...")
    await host.stop()
