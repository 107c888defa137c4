"""The scripted engine inside Ray Serve, in the ways that Serve has to bring an answer out: a peer of the router.

`python -m benchmarks.router.serve_app --way haproxy|proxy|handle --port P` runs a cluster of its own until killed.

haproxy: the replica's own port behind Serve's HAProxy, with the flags for throughput. proxy: Serve's Python proxy.
handle: the Python proxy, and an ingress replica that streams from the engine's through a DeploymentHandle.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Annotated, Any

import typer

_FLAGS = {
    "haproxy": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
    },
    "proxy": {},
    "handle": {},
}
_COMMON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_AUTH_MODE": "disabled",
}
_MANY = 100_000


class Way(StrEnum):
    HAPROXY = "haproxy"
    PROXY = "proxy"
    HANDLE = "handle"


def build_engine() -> Any:
    """The ASGI app of a replica, by the script in the environment."""
    from serving.engine.scripted.app import ScriptedEngine
    from serving.settings.stack import ScriptSettings

    return ScriptedEngine(ScriptSettings.model_validate_json(os.environ["BENCHMARK_SCRIPT"]), ["nano"])


class Tokens:
    """The engine behind a handle: what it sends, as a stream of bytes."""

    def __init__(self) -> None:
        self._engine = build_engine()

    async def stream(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The body of one answer, in pieces as they come."""
        import asyncio

        frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        never: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def receive() -> dict[str, Any]:
            return next(messages, None) or await never

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        answering = asyncio.create_task(self._engine(scope, receive, frames.put))
        while (message := await frames.get()).get("more_body", True):
            if message.get("body"):
                yield message["body"]
        yield message["body"]
        await answering


def _build_chain(serve: Any, options: dict[str, Any]) -> Any:
    from starlette.responses import JSONResponse, Response, StreamingResponse

    class Ingress:
        def __init__(self, tokens: Any) -> None:
            self._tokens = tokens.options(stream=True)

        async def __call__(self, request: Any) -> Response:
            if request.method == "GET":
                return JSONResponse({"data": []})
            frames = self._tokens.stream.remote(request.url.path, await request.body())
            return StreamingResponse(frames, media_type="text/event-stream")

    return serve.deployment(Ingress, **options).bind(serve.deployment(Tokens, **options).bind())


def main(
    way: Annotated[Way, typer.Option()],
    port: Annotated[int, typer.Option()],
    script: Annotated[str, typer.Option(help="ScriptSettings as JSON.")] = "{}",
) -> None:
    """Serve until killed."""
    # Read when Ray is imported, and handed on to every process of the cluster.
    os.environ.update({**_COMMON, **_FLAGS[way], "BENCHMARK_SCRIPT": script})
    import ray
    from ray import serve

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"max_ongoing_requests": _MANY, "ray_actor_options": {"num_cpus": 0.5}}
    if way is Way.HANDLE:
        app = _build_chain(serve, options)
    else:
        app = serve.deployment(serve.ingress(build_engine)(), **options).bind()
    serve.run(app, name="engine", route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    typer.run(main)
