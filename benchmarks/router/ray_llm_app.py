"""`ray.serve.llm` around the scripted engine, in one of its modes: runs in an environment of its own (see `ray_llm`).

The engine is put in by Ray's own door for that, the variable RAYLLM_VLLM_ENGINE_CLS; everything else is Ray's, as its
documentation starts it: `build_openai_app` for one model.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

_HAPROXY = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
}
FLAGS: dict[str, dict[str, str]] = {
    "default": {},
    "haproxy": _HAPROXY,
    "direct": {**_HAPROXY, "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"},
}
_COMMON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_AUTH_MODE": "disabled",
    "RAYLLM_VLLM_ENGINE_CLS": "benchmarks.router.ray_llm_app.ScriptedVLLM",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class ScriptedVLLM:
    """Ray's `LLMEngine` over the scripted one: as much of it as serving chat takes."""

    def __init__(self, llm_config: Any) -> None:
        from serving.engine.scripted.app import ScriptedEngine
        from serving.settings.stack import ScriptSettings

        script = ScriptSettings.model_validate_json(os.environ["BENCHMARK_SCRIPT"])
        self._engine = ScriptedEngine(script, ["nano"])

    async def start(self) -> None:
        return

    async def check_health(self) -> None:
        return

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def build_asgi_app(self) -> Any:
        """What the direct mode serves: a FastAPI app, to which Ray adds a middleware and a route."""
        from fastapi import FastAPI

        app = FastAPI(redirect_slashes=False)  # Ray's route for one model would take the list's
        app.router.default = self._engine
        return app

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[str]:
        """What the other modes take frames from."""
        frames: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        messages = iter([{"type": "http.request", "body": request.model_dump_json(exclude_unset=True).encode()}])
        never: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def receive() -> dict[str, Any]:
            return next(messages, None) or await never

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        answering = asyncio.create_task(self._engine(scope, receive, frames.put))
        while True:
            message = await frames.get()
            if message.get("body"):
                yield message["body"].decode()
            if not message.get("more_body", True):
                break
        await answering


def main(mode: str, port: int, script: str) -> None:
    """Serve until killed."""
    os.environ.update({**_COMMON, **FLAGS[mode], "BENCHMARK_SCRIPT": script})
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = LLMConfig(
        model_loading_config={"model_id": "nano", "model_source": "/nonexistent"},
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 0.5}]},
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}},
        runtime_env={"env_vars": {"BENCHMARK_SCRIPT": script}},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
