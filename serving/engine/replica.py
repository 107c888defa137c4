"""One Ray Serve replica: an engine with vLLM's own OpenAI server on its own port.

Ray Serve places the replica, checks its health and replaces it. Requests never pass through Serve: the replica reports
its address to the directory, and routers connect to it directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from serving.cluster.deployment_versions import engine_version, max_replicas, surge_percent, with_version
from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.cluster.directory_actor import reach_directory
from serving.engine.autoscaling import build_autoscaling
from serving.engine.backends import Engine, run_engine
from serving.engine.failures import StartLog, explain, is_transient
from serving.http.addresses import http_url
from serving.http.server import HttpServer
from serving.settings.stack import ModelSettings, Settings

logger = logging.getLogger(__name__)

# Set for every process of the replica. The settings' `env` may override them.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_MEDIA_CONNECTOR": "serving",  # images stay encoded until the plugin's pipeline decodes them
}
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 30.0
_MANY = 100_000
_MAX_STARTS = 3
"""Consecutive failed starts after which the deployment fails and the reason is reported."""
_LOOK_S = 0.1
_NOTICE_S = 5.0
"""How long to wait until all routers know that a replica is draining; a router that hangs must not block it."""
_IN_FLIGHT_S = 0.25
"""Longest time between a router's choice of this replica and the arrival of the request."""
_USAGE_S = 2.0
"""How long after the end of a request its router may still ask for its usage."""


class EngineStartError(Exception):
    """The engine did not start; the message is that of the engine."""


class EngineReplica:
    """The class of the deployment; `build_engine_app` wraps it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, name: str, settings: Settings, checkpoint: str
    ) -> None:
        self._settings = settings
        self._record = ReplicaRecord(
            replica_id=serve.get_replica_context().replica_id.unique_id,
            model=name,
            base_url="",
            state=ReplicaState.STARTING,
            stage="starting",
            pid=os.getpid(),
        )
        self._directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
        self._log = StartLog()
        self._running = contextlib.AsyncExitStack()
        self._news = asyncio.Event()
        self._heartbeat = asyncio.create_task(self._tell_forever())
        self._watching: asyncio.Task[None] | None = None
        try:
            await asyncio.sleep(0)  # sends the first heartbeat before imports block the event loop
            await self._start(name, checkpoint)
        except Exception as error:
            reason = explain(error, self._log.read())
            await self._report_failure(name, reason)
            await self._leave()
            raise EngineStartError(reason) from error
        except BaseException:
            await self._leave()
            raise

    async def _report_failure(self, model: str, reason: str) -> None:
        """Report a failed start to the directory: Serve retries, but clients should not wait for a start that cannot
        succeed."""
        if not is_transient(reason):
            with contextlib.suppress(ray.exceptions.RayError):
                await self._directory.fail.remote(model, reason)

    async def _start(self, name: str, checkpoint: str) -> None:
        starting = run_engine(name, self._settings, checkpoint, say=lambda stage: self._update(stage=stage))
        self._engine: Engine = await self._running.enter_async_context(starting)
        host = self._settings.engine.host
        host = ray.util.get_node_ip_address() if host == "auto" else host
        # Requests have ended before the server stops, see `_drain`; the remaining ones have exceeded their time.
        self._server = HttpServer(self._engine.app, host=host, port=0, drain_s=1, has_lifespan=True)
        await self._server.start()
        self._update(**self._engine.facts)
        self._update(stage="", state=ReplicaState.READY, base_url=http_url(host, self._server.port))
        self._watching = asyncio.create_task(self._watch_engine())

    async def check_health(self) -> None:
        """Check the replica's health. Called by Ray Serve, which replaces a replica that raises.

        Raises:
            RuntimeError: the engine's process or the HTTP server has died.
        """
        client = self._engine.client
        if client.errored or not client.is_running:
            raise RuntimeError(f"the engine of {self._record.replica_id} has died: {client.dead_error!r}")
        if not self._server.is_serving:
            raise RuntimeError(f"the HTTP server of {self._record.replica_id} has ended")

    async def __del__(self) -> None:
        """Refuse new requests, finish running ones, stop the engine. Called by Ray Serve before it ends the replica."""
        if self._record.state is ReplicaState.READY:
            if not self._engine.client.errored:
                await self._drain()
            await self._server.stop()
        await self._leave()

    async def _drain(self) -> None:
        """Let running requests end, for at most `drain_s`, while new requests go to other replicas.

        No request is refused meanwhile: the port stays open until every router knows and its requests have ended, so
        requests that were already sent are served normally.
        """
        self._update(state=ReplicaState.DRAINING)
        await self._tell()
        with contextlib.suppress(ray.exceptions.RayError):
            if not await self._directory.settle.remote(_NOTICE_S):
                logger.warning("not every router has heard that %s drains", self._record.replica_id)
        await asyncio.sleep(_IN_FLIGHT_S)
        app = self._engine.app
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(app.wait_idle(), self._settings.engine.drain_s)
        await asyncio.sleep(max(0.0, app.last_end_s + _USAGE_S - time.monotonic()))

    async def _watch_engine(self) -> None:
        """Remove a dead engine from the directory immediately, long before Ray Serve's next health check."""
        client = self._engine.client
        while True:
            await asyncio.sleep(_LOOK_S)
            if client.errored or not client.is_running:
                break
        logger.error("the engine of %s has died: %r", self._record.replica_id, client.dead_error)
        self._engine.fail()
        await self._say_goodbye()

    async def _leave(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await self._say_goodbye()
        await self._running.aclose()

    async def _say_goodbye(self) -> None:
        self._heartbeat.cancel()
        with contextlib.suppress(ray.exceptions.RayError):
            await self._directory.remove.remote(self._record.replica_id)

    def _update(self, **changes: Any) -> None:
        self._record = dataclasses.replace(self._record, **changes)
        self._news.set()

    async def _tell_forever(self) -> None:
        """Send heartbeats, and every change immediately."""
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


def _environment(settings: Settings, model: ModelSettings) -> dict[str, str]:
    # The router has already checked sizes; the limit also applies to an engine that is reached in another way.
    limit = {"VLLM_MAX_IMAGE_PIXELS": str(settings.router.limits.max_image_pixels)}
    # The variable would make vLLM use gRPC; the endpoint is given in its arguments.
    traces = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "serving-engine"}
    is_traced = settings.telemetry.otlp_endpoint is not None
    return {**_ENVIRONMENT, **limit, **(traces if is_traced else {}), **model.images.environment(), **model.env}


def build_engine_app(name: str, settings: Settings, checkpoint: str) -> Application:
    """Build the Serve application that runs one model's replicas.

    Deploying it again applies changes, and replaces replicas only if they would behave differently.

    Args:
        name: the model, a key of `settings.models`.
        settings: all settings.
        checkpoint: an absolute directory (to which the nano checkpoint is written, if the model uses it) or a Hugging
            Face repository.
    """
    model = settings.models[name]
    scaling: dict[str, Any] = {"num_replicas": model.num_replicas}
    if model.autoscaling is not None:
        scaling = {"autoscaling_config": build_autoscaling(name, model.autoscaling, settings)}
    deployment = serve.deployment(
        EngineReplica,
        name=f"engine-{name}",
        **scaling,
        max_ongoing_requests=_MANY,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.engine.drain_s + 30,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=_MAX_STARTS,
        max_surge_percent=surge_percent(settings, max_replicas(model), model.gpus_per_replica),
        ray_actor_options={
            "num_cpus": model.cpus_per_replica,
            "num_gpus": model.gpus_per_replica,
            "resources": dict(model.resources_per_replica),
            "runtime_env": {"env_vars": _environment(settings, model)},
        },
    )
    return with_version(deployment, engine_version(name, settings, checkpoint)).bind(name, settings, checkpoint)
