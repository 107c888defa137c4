"""One Ray Serve replica: a vLLM `AsyncLLM` with vLLM's own OpenAI server on a port of the replica's.

Ray Serve places it, watches its health and replaces it. Requests never pass through Serve: the replica tells the
directory its address, and routers come straight to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from serving.demo.build import build_checkpoint
from serving.directory import ReplicaRecord, ReplicaState
from serving.engine.arguments import build_arguments
from serving.engine.directory import reach_directory
from serving.errors import SettingsError
from serving.http_server import HttpServer
from serving.settings import NANO, ModelSettings, Settings

logger = logging.getLogger(__name__)

# Known to every process of the replica. A user's `env` may change them.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_MEDIA_CONNECTOR": "serving",  # leaves images encoded until the plugin's pipeline takes them
}
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 30.0
_MANY = 100_000
_MAX_STARTS = 3
"""Starts that may fail one after another before the deployment is given up and the reason shown."""


class EngineReplica:
    """The class behind the deployment; `build_engine_app` wraps it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, name: str, settings: Settings, checkpoint: str
    ) -> None:
        self._settings = settings
        self._record = ReplicaRecord(
            replica_id=serve.get_replica_context().replica_id.unique_id,
            model=name,
            base_url="",
            state=ReplicaState.STARTING,
            stage="importing vLLM",
            pid=os.getpid(),
        )
        self._directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
        self._running = contextlib.AsyncExitStack()
        self._news = asyncio.Event()
        self._heartbeat = asyncio.create_task(self._tell_forever())
        try:
            await asyncio.sleep(0)  # lets the first heartbeat out before the imports hold the loop
            await self._start(name, settings.models[name], checkpoint)
        except BaseException:
            await self._leave()
            raise

    async def _start(self, name: str, model: ModelSettings, checkpoint: str) -> None:
        if model.checkpoint == NANO:
            await asyncio.to_thread(build_checkpoint, Path(checkpoint))
        private = await asyncio.to_thread(_import_vllm)
        arguments = _parse(private, build_arguments(name, model, self._settings.engine, checkpoint))
        self._update(stage="starting the engine process and loading weights")
        self._engine, app = await self._running.enter_async_context(private.run_engine(arguments))
        host = self._settings.engine.host
        host = ray.util.get_node_ip_address() if host == "auto" else host
        self._server = HttpServer(app, host=host, port=0, drain_s=self._settings.engine.drain_s, has_lifespan=True)
        await self._server.start()
        config = self._engine.vllm_config
        self._update(
            stage="",
            state=ReplicaState.READY,
            base_url=f"http://{f'[{host}]' if ':' in host else host}:{self._server.port}",
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_model_len=config.model_config.max_model_len,
            image_config=_scalars(config.model_config.hf_image_processor_config),
            image_options=_scalars(config.model_config.multimodal_config.mm_processor_kwargs or {}),
        )

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises.

        Raises:
            RuntimeError: the engine's process or the HTTP server has died.
        """
        if self._engine.errored or not self._engine.is_running:
            raise RuntimeError(f"the engine of {self._record.replica_id} has died: {self._engine.dead_error!r}")
        if not self._server.is_serving:
            raise RuntimeError(f"the HTTP server of {self._record.replica_id} has ended")

    async def __del__(self) -> None:
        """Called by Ray Serve before it ends the replica: take no more, finish what runs, stop the engine."""
        if self._record.state is ReplicaState.READY:
            self._update(state=ReplicaState.DRAINING)
            await self._tell()
            await self._server.stop()
        await self._leave()

    async def _leave(self) -> None:
        self._heartbeat.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._directory.remove.remote(self._record.replica_id)
        await self._running.aclose()

    def _update(self, **changes: Any) -> None:
        self._record = dataclasses.replace(self._record, **changes)
        self._news.set()

    async def _tell_forever(self) -> None:
        """Heartbeats; a change goes out at once."""
        while True:
            await self._tell()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._settings.engine.heartbeat_s)
            self._news.clear()

    async def _tell(self) -> None:
        try:
            await self._directory.put.remote(self._record)
        except ray.exceptions.RayError as error:
            logger.warning("the replica directory cannot be reached, trying again: %s", error)


def _scalars(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The plain values of a configuration, fit for a record that is compared and sent."""
    return tuple((key, value) for key, value in sorted(config.items()) if isinstance(value, bool | int | float | str))


def _import_vllm() -> ModuleType:
    """Takes seconds, so a thread does it while the event loop goes on."""
    import vllm  # noqa: F401

    from serving.plugin import private

    return private


def _parse(private: ModuleType, flags: list[str]) -> Any:
    """vLLM's namespace for its command line.

    Raises:
        SettingsError: `engine_args` that vLLM does not accept.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return private.parse_server_args(flags)
    except SystemExit:
        last = (complaint.getvalue().strip().splitlines() or ["no reason given"])[-1]
        raise SettingsError(f"engine_args: vLLM does not accept them: {last.partition('error: ')[2] or last}") from None


def _environment(settings: Settings, model: ModelSettings) -> dict[str, str]:
    # The router has looked at sizes already; an engine that is reached some other way has the same limit.
    limit = {"VLLM_MAX_IMAGE_PIXELS": str(settings.router.limits.max_image_pixels)}
    return {**_ENVIRONMENT, **limit, **model.images.environment(), **model.env}


def build_engine_app(name: str, settings: Settings, checkpoint: str) -> Application:
    """The Serve application that runs one model's replicas.

    Args:
        name: the model, a key of `settings.models`.
        settings: the whole of them.
        checkpoint: an absolute directory (where the nano checkpoint is written to, if that is the model's) or a
            Hugging Face repository.
    """
    model = settings.models[name]
    deployment = serve.deployment(
        EngineReplica,
        name=f"engine-{name}",
        num_replicas=model.num_replicas,
        max_ongoing_requests=_MANY,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.engine.drain_s + 30,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=_MAX_STARTS,
        ray_actor_options={
            "num_cpus": model.cpus_per_replica,
            "num_gpus": model.gpus_per_replica,
            "runtime_env": {"env_vars": _environment(settings, model)},
        },
    )
    return deployment.bind(name, settings, checkpoint)
