"""An OCR service on a socket, in front of a real router with engines that answer as a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from serving.ocr.host import OcrHost
from serving.ocr.reading.router_client import Routers
from serving.settings.billing import BillingSettings
from serving.settings.ocr import OcrSettings
from serving.settings.router import LimitSettings
from serving.settings.stack import Settings
from support.router_stack import Engine, Exchange, RunningRouter, Script, build_settings, connect, run_router

DONE = b"data: [DONE]\n\n"
BODY_BYTES = 20_000_000
_BACKSTOP_S = 200.0
"""For what will never happen: a busy machine may take long to read a page."""


def frame(text: str = "", **choice: Any) -> bytes:
    return (
        b"data: "
        + orjson.dumps({"object": "chunk", "choices": [{"index": 0, "delta": {"content": text}, **choice}]})
        + b"\n\n"
    )


def tail(prompt: int = 80, completion: int = 10, image: int = 73) -> bytes:
    """The frame with usage, and the end."""
    details = {"multimodal_tokens": {"image": image}}
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    return (
        b"data: "
        + orjson.dumps({"choices": [], "usage": {**usage, "prompt_tokens_details": details}}).replace(
            b'"usage": {', b'"usage":{'
        )
        + b"\n\n"
        + DONE
    )


def reads(text: str = "Hello page", pause_s: float = 0.0) -> Script:
    """An engine that finds this on every page."""

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for word in text.split(" ")[:-1]:
            await exchange.chunk(frame(word + " "))
        await asyncio.sleep(pause_s)
        await exchange.chunk(frame(text.split(" ")[-1], finish_reason="stop"))
        await exchange.chunk(tail())
        await exchange.end()

    return script


@dataclass
class RunningService:
    host: OcrHost
    client: httpx.AsyncClient
    router: RunningRouter
    engine: Engine
    settings: Settings

    async def upload(self, data: bytes, path: str = "/v1/ocr", **fields: Any) -> httpx.Response:
        """As a form."""
        headers = fields.pop("headers", {})
        form = {"model": "nano", **{name: str(value) for name, value in fields.items()}}
        return await self.client.post(path, data=form, files={"file": ("x", data)}, headers=headers)

    async def wait_for(self, job_id: str, *states: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
        async with asyncio.timeout(_BACKSTOP_S):
            while True:
                job = (await self.client.get(f"/v1/ocr/jobs/{job_id}", headers=headers)).json()
                if job["status"] in states:
                    return job
                await asyncio.sleep(0.02)


def build_service_settings(folder: Path, *, billing: BillingSettings | None = None, **ocr: Any) -> Settings:
    jobs = {"poll_s": 0.05, "lease_s": 1.0, "settle_s": 0.1, **ocr.pop("jobs", {})}
    limits = LimitSettings(max_body_bytes=BODY_BYTES)
    router = build_settings(limits=limits).router
    return build_settings().model_copy(
        update={
            "router": router,
            "billing": billing or BillingSettings(directory=folder / "billing"),
            "ocr": OcrSettings.model_validate({"directory": folder / "ocr", "enabled": True, "jobs": jobs, **ocr}),
        }
    )


@contextlib.asynccontextmanager
async def run_service(
    folder: Path,
    script: Script | None = None,
    *,
    settings: Settings | None = None,
    keys_file: Path | None = None,
    **ocr: Any,
) -> AsyncIterator[RunningService]:
    settings = settings or build_service_settings(folder, **ocr)
    given: dict[str, Any] = {"keys_file": keys_file} if keys_file is not None else {}
    router_settings = build_settings(limits=settings.router.limits, **given)
    async with (
        Engine(script or reads(), max_num_seqs=64) as engine,
        run_router(engine.record, settings=router_settings) as router,
        run_host(settings, router.port) as (host, client),
    ):
        yield RunningService(host, client, router, engine, settings)


@contextlib.asynccontextmanager
async def run_host(
    settings: Settings, router_port: int, drain_s: float = 0.1
) -> AsyncIterator[tuple[OcrHost, httpx.AsyncClient]]:
    engine = settings.engine.model_copy(update={"drain_s": drain_s})
    hosted = settings.model_copy(update={"engine": engine})
    host = OcrHost(hosted, Routers(f"http://127.0.0.1:{router_port}"), "127.0.0.1")
    await host.start()
    try:
        async with connect(host.port, 30) as client:
            yield host, client
    finally:
        await host.stop()
