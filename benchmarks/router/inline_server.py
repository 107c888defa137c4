"""A scripted engine with the router's checks in its own process: what a replica is in `router.mode: inline`."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Annotated, Any

import typer
import uvloop

from serving.directory import ReplicaRecord, ReplicaState
from serving.engine.scripted import ScriptedEngine
from serving.http_server import HttpServer
from serving.router.inline import build_inline_app
from serving.settings import ModelSettings, ScriptSettings, Settings

_PLENTY = 2**40


def main(
    port: Annotated[int, typer.Option()],
    script: Annotated[str, typer.Option(help="ScriptSettings as JSON.")] = "{}",
) -> None:
    """Serve until killed."""
    uvloop.run(_serve(ScriptSettings.model_validate_json(script), port))


async def _serve(script: ScriptSettings, port: int) -> None:
    settings = Settings(models={"nano": ModelSettings(checkpoint="nano")})
    engine = ScriptedEngine(script, ["nano"])
    url = f"http://127.0.0.1:{port}"
    record = ReplicaRecord("engine", "nano", url, ReplicaState.READY, 4096, capacity_tokens=_PLENTY, max_model_len=8192)

    def read_usage(request_id: str) -> dict[str, Any] | None:
        usage = engine.find_usage(request_id)
        return None if usage is None else dataclasses.asdict(usage)

    app = build_inline_app(settings, engine, read_usage, lambda: record)
    server = HttpServer(app, host="127.0.0.1", port=port, drain_s=1, limits=settings.router.limits)
    await app.start()
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    typer.run(main)
