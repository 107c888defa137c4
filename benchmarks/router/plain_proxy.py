"""The proxy that everybody writes: takes a request, asks the engine, passes on what comes. A peer of the router.

`python -m benchmarks.router.plain_proxy --way aiohttp|httpx --engine URL --port P`. It knows no keys, limits, prices,
retries or replicas: what it costs is what forwarding costs with these libraries, and what the router costs beside it is
the price of the rest. Both run on uvloop, as the router does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Annotated, Any

import typer
import uvloop


class Library(StrEnum):
    AIOHTTP = "aiohttp"
    """Server and client of aiohttp."""
    HTTPX = "httpx"
    """Starlette on uvicorn, and httpx."""


async def serve_aiohttp(engine: str, port: int) -> None:
    """Until killed."""
    import aiohttp
    from aiohttp import web

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        body = await request.read()
        async with session.request(request.method, f"{engine}{request.path_qs}", data=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


async def serve_httpx(engine: str, port: int) -> None:
    """Until killed."""
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(base_url=engine, limits=limits, timeout=None)  # noqa: S113 - streams last as long as they do

    async def forward(request: Request) -> StreamingResponse:
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        asked = client.build_request(request.method, request.url.path, content=await request.body(), headers=headers)
        answer = await client.send(asked, stream=True)

        async def pass_on() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(answer):
                async for piece in answer.aiter_raw():
                    yield piece

        return StreamingResponse(pass_on(), answer.status_code, media_type=answer.headers.get("content-type"))

    app: Any = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])
    config = uvicorn.Config(app, "127.0.0.1", port, access_log=False, log_level="error")
    await uvicorn.Server(config).serve()


def main(
    way: Annotated[Library, typer.Option()],
    engine: Annotated[str, typer.Option(help="Base URL of the engine.")],
    port: Annotated[int, typer.Option()],
) -> None:
    """Forward everything to one engine until killed."""
    serve = serve_aiohttp if way is Library.AIOHTTP else serve_httpx
    uvloop.run(serve(engine, port))


if __name__ == "__main__":
    typer.run(main)
