"""Decides when Ray Serve replaces running replicas: deployment versions derived from the settings, not random ones."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import SecretStr

from serving.settings.base import Frozen
from serving.settings.stack import ModelSettings, Settings

# Settings that engine replicas never read: changing them restarts no replica.
_FOREIGN = {"num_replicas", "autoscaling", "price", "start_timeout_s"}
# Model settings that routers never read: an engine reports what routers need to the directory.
_INNER = {"num_replicas", "autoscaling", "start_timeout_s", "engine_args", "env", "images", "script"}


def engine_version(name: str, settings: Settings, checkpoint: str) -> str:
    """Return a version that changes when a replica of this model would behave differently."""
    model = settings.models[name].model_dump(exclude=_FOREIGN)
    pixels = settings.router.limits.max_image_pixels
    parts = [name, checkpoint, model, settings.engine.model_dump(), settings.ray.namespace, pixels]
    telemetry = settings.telemetry
    parts += [telemetry.otlp_endpoint, telemetry.metrics_key, telemetry.opens_metrics]
    return _digest(parts)


# The settings of the OCR section that routers read.
_RELAYED = {"enabled", "max_document_bytes", "directory", "secret"}


def router_version(settings: Settings) -> str:
    """Return a version that changes when a router would behave differently."""
    models = dict.fromkeys(settings.models, _INNER)
    foreign = set(type(settings.ocr).model_fields) - _RELAYED
    return _digest(settings.model_dump(exclude={"models": models, "router": {"num_replicas"}, "ocr": foreign}))


def ocr_version(settings: Settings) -> str:
    """Return a version that changes when an OCR service would behave differently."""
    ocr = settings.ocr.model_dump(exclude={"num_replicas"})
    parts = (settings.router.limits, settings.billing, settings.log, settings.ray.namespace, settings.engine.drain_s)
    metrics = (settings.telemetry.metrics_host, settings.telemetry.metrics_key)
    where = (settings.router.host, settings.router.port, settings.router.allowed_hosts)
    return _digest(
        [ocr, *(part.model_dump() if isinstance(part, Frozen) else part for part in parts), *where, *metrics]
    )


def surge_percent(settings: Settings, num_replicas: int, gpus_per_replica: float = 0) -> int:
    """Return how many extra replicas may run during a rolling update, in per cent: enough for one, or none.

    In our own cluster Ray's CPUs are only a number, so a new replica becomes ready before an old one ends, and a new
    one that fails takes down no old one. On an existing cluster there may be no room for an extra replica, and Serve
    would wait for it forever; there an old replica ends first.
    """
    if settings.ray.address is not None or gpus_per_replica:
        return 0
    return max(1, 100 // num_replicas)


def max_replicas(model: ModelSettings) -> int:
    """Return the largest number of replicas of a model."""
    return model.autoscaling.max_replicas if model.autoscaling is not None else model.num_replicas


def with_version(deployment: Any, version: str) -> Any:
    """Return the Serve deployment with an explicit version.

    Serve removed `version` from its public options and draws a random one, so that every deployment replaces all
    replicas. The internal option still exists; this function fails if it is gone.
    """
    versioned = deployment.options(version=version, _internal=True)
    if versioned.version != version:
        raise RuntimeError("this version of Ray Serve does not keep the version of a deployment")
    return versioned


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return the value with secrets revealed and keys sorted, so that a new key changes the version too."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return sorted((key, repr(_plain(part))) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
