"""One router process in front of given engines: what a router replica is, without Ray around it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
import uvloop

from serving.cluster.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.http.server import HttpServer
from serving.router.app import RouterApp
from serving.settings.stack import ModelSettings, Settings

_PLENTY = 2**40


def main(
    engine: Annotated[list[str], typer.Option(help="Base URL of an engine; may be given again.")],
    port: Annotated[int, typer.Option()],
) -> None:
    """Route to the engines until killed."""
    uvloop.run(_serve(engine, port))


async def _serve(engines: list[str], port: int) -> None:
    settings = Settings(models={"nano": ModelSettings(checkpoint="nano")})
    records = tuple(
        ReplicaRecord(f"engine-{i}", "nano", url, ReplicaState.READY, 4096, capacity_tokens=_PLENTY, max_model_len=8192)
        for i, url in enumerate(engines)
    )
    snapshot = Snapshot((1, 1), records)
    app = RouterApp(settings, read_snapshot=lambda: snapshot)
    server = HttpServer(app, host="127.0.0.1", port=port, drain_s=1, limits=settings.router.limits)
    await app.start()
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    typer.run(main)
