"""What makes Ray Serve replace a running replica, and how: in the place of a random version at each deployment."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import SecretStr

from serving.settings.base import Frozen
from serving.settings.stack import ModelSettings, Settings

# What replicas of an engine never look at: changing it leaves them alone.
_FOREIGN = {"num_replicas", "autoscaling", "price", "start_timeout_s"}
# Settings of models that routers never look at: what they need of an engine, it tells the directory.
_INNER = {"num_replicas", "autoscaling", "start_timeout_s", "engine_args", "env", "images", "script"}


def engine_version(name: str, settings: Settings, checkpoint: str) -> str:
    """Changes when a replica of this model would run something else."""
    model = settings.models[name].model_dump(exclude=_FOREIGN)
    pixels = settings.router.limits.max_image_pixels
    parts = [name, checkpoint, model, settings.engine.model_dump(), settings.ray.namespace, pixels]
    telemetry = settings.telemetry
    parts += [telemetry.otlp_endpoint, telemetry.metrics_key, telemetry.opens_metrics]
    return _digest(parts)


# Of the OCR section, what routers look at.
_RELAYED = {"enabled", "max_document_bytes", "directory", "secret"}


def router_version(settings: Settings) -> str:
    """Changes when a router would do something else."""
    models = dict.fromkeys(settings.models, _INNER)
    foreign = set(type(settings.ocr).model_fields) - _RELAYED
    return _digest(settings.model_dump(exclude={"models": models, "router": {"num_replicas"}, "ocr": foreign}))


def ocr_version(settings: Settings) -> str:
    """Changes when an OCR service would do something else."""
    ocr = settings.ocr.model_dump(exclude={"num_replicas"})
    parts = (settings.router.limits, settings.billing, settings.log, settings.ray.namespace, settings.engine.drain_s)
    metrics = (settings.telemetry.metrics_host, settings.telemetry.metrics_key)
    where = (settings.router.host, settings.router.port, settings.router.allowed_hosts)
    return _digest(
        [ocr, *(part.model_dump() if isinstance(part, Frozen) else part for part in parts), *where, *metrics]
    )


def surge_percent(settings: Settings, num_replicas: int, gpus_per_replica: float = 0) -> int:
    """How many more replicas there may be while they are replaced, in per cent: enough for one, or none.

    In a cluster of our own CPUs are only a number, so a new replica is ready before an old one ends, and a new one that
    fails takes no old one with it. Elsewhere there may be no room for one more, and Serve would wait for it for ever:
    an old one goes first.
    """
    if settings.ray.address is not None or gpus_per_replica:
        return 0
    return max(1, 100 // num_replicas)


def max_replicas(model: ModelSettings) -> int:
    """The most replicas that a model may have."""
    return model.autoscaling.max_replicas if model.autoscaling is not None else model.num_replicas


def with_version(deployment: Any, version: str) -> Any:
    """The Serve deployment under a version of ours.

    Serve has taken `version` out of its public options and draws a random one instead, so that deploying again always
    replaces everything. The inner option is still there; this fails loudly when it is not.
    """
    versioned = deployment.options(version=version, _internal=True)
    if versioned.version != version:
        raise RuntimeError("this version of Ray Serve does not keep the version of a deployment")
    return versioned


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """The same with secrets in the open, in one order: a new key is a change too."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return sorted((key, repr(_plain(part))) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
