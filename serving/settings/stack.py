"""The settings of a stack: frozen models, and the functions that load them.

A value comes from the file given with `--config`, overridden by the environment: `SERVING__ROUTER__PORT=9000` sets
`router.port`, `SERVING__MODELS__NANO__NUM_REPLICAS=2` sets `models.nano.num_replicas`. Anything that is not understood
is refused with its source, its key and the reason.
"""

from __future__ import annotations

import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, SecretStr, ValidationError, model_validator

from serving.errors import SettingsError
from serving.settings.base import ANY_ADDRESS, Amount, Frozen, Name, is_loopback
from serving.settings.billing import BillingSettings, PriceSettings
from serving.settings.ocr import OcrSettings
from serving.settings.router import RouterSettings
from serving.settings.sources import ENV_PREFIX, overlay, read_yaml
from serving.settings.telemetry import LogSettings, TelemetrySettings

__all__ = ["ENV_PREFIX", "NANO", "PriceSettings", "Settings", "dump_settings", "load_settings"]

NANO = "nano"
"""Instead of a checkpoint's path: the small checkpoint that ships with the project."""

_SECRET_NAME = re.compile(r"token(?!s|izer)|secret|password|api_?key|credential", re.IGNORECASE)
_MASK = "**********"


class ImageSettings(Frozen):
    """How a replica decodes and tiles pages."""

    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Worker processes for decoding and tiling; 0 uses threads of the API process."""
    queue: Annotated[int, Field(ge=1)] = 64
    """Pages that may queue for a worker."""
    queue_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A request that finds no room in the queue for so long is refused with 503."""
    work_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A worker that spends longer on one page is killed, and the page fails."""

    def environment(self) -> dict[str, str]:
        """The same settings as environment variables, by which the plugin is configured in a bare vLLM server too."""
        return {f"SERVING_IMAGE_{name.upper()}": str(value) for name, value in self.model_dump().items()}


class AutoscalingSettings(Frozen):
    """Autoscaling: the number of replicas follows the work, queued and running."""

    min_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    target_load: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Target work per replica, as a fraction of its capacity."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _check_range(self) -> AutoscalingSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class ScriptSettings(Frozen):
    """The scripted engine, a stand-in for vLLM in tests and benchmarks: it has vLLM's API but no model."""

    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Tokens per second of one sequence; None is unlimited."""
    prefill_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    output_tokens: Annotated[int, Field(ge=1)] = 64
    """Length of an answer, unless the request's `max_tokens` is smaller."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    kv_tokens: Annotated[int, Field(ge=1)] = 65_536
    """Capacity that the engine reports to the directory."""
    max_model_len: Annotated[int, Field(ge=1)] = 8192
    start_s: Annotated[float, Field(ge=0)] = 0.0
    failures: tuple[str, ...] = ()
    """Failures to simulate, see `serving/engine/scripted/failures.py`."""


class ModelSettings(Frozen):
    """One model: its checkpoint, the names it is served under, and its replicas."""

    checkpoint: str
    """A directory, a Hugging Face repository, or `nano` for the checkpoint that ships with the project."""
    aliases: tuple[Name, ...] = ()
    num_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    autoscaling: AutoscalingSettings | None = None
    """Replaces a fixed `num_replicas`."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    """GPUs of a replica: a whole number, or the part of one that it shares with others (0.5: two engines a GPU)."""
    resources_per_replica: dict[Name, Amount] = Field(default_factory=dict)
    """Custom Ray resources that a replica needs, to place replicas on the nodes that offer them."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments under vLLM's own names (`max_model_len`, `enable_chunked_prefill`, ...)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the replica's processes (`VLLM_...`, `OMP_...`)."""
    images: ImageSettings = ImageSettings()
    price: PriceSettings = PriceSettings()
    start_timeout_s: Annotated[float, Field(gt=0)] = 900
    script: ScriptSettings | None = None
    """Runs the scripted engine instead of vLLM, to test and measure everything around the engine."""

    @model_validator(mode="after")
    def _check_engine_args(self) -> ModelSettings:
        owned = {"model", "served_model_name", "host", "port", "api_key"} & {
            name.replace("-", "_") for name in self.engine_args
        }
        if owned:
            raise ValueError(f"engine_args may not set {sorted(owned)}: the stack sets them itself")
        return self

    @model_validator(mode="after")
    def _check_gpu_share(self) -> ModelSettings:
        """Ray places replicas by their parts of a GPU, but each takes the memory that its engine arguments say."""
        part = self.gpus_per_replica
        if part > 1 and part % 1:
            raise ValueError(f"gpus_per_replica {part} must be a whole number, or less than 1 to share a GPU")
        if 0 < part < 1 and self.script is None:
            given = {name.replace("-", "_"): value for name, value in self.engine_args.items()}
            memory = given.get("gpu_memory_utilization")
            if not isinstance(memory, int | float) or memory > part:
                raise ValueError(
                    f"engine_args.gpu_memory_utilization must be at most {part}, the replica's part of a GPU "
                    "(gpus_per_replica); vLLM's default takes nearly all of its memory"
                )
        return self


class EngineSettings(Frozen):
    """Settings that all engine replicas share."""

    host: str = "127.0.0.1"
    """Address that replicas listen on and are reached at; `auto` is the node's own address."""
    api_key: SecretStr | None = None
    """Key that engines require and routers send. None: `serving up` generates one for the run if the router has API
    keys or `host` is not a loopback address."""
    allow_unauthenticated: bool = False
    """Required to run engines without a key where one would be generated. Anyone who can reach an engine may use it."""
    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    lease_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """A replica is removed from the directory when no heartbeat has arrived for so long."""
    drain_s: Annotated[float, Field(ge=0)] = 60.0
    """How long running requests may continue after a replica was asked to stop."""

    @model_validator(mode="after")
    def _check_address(self) -> EngineSettings:
        if self.host in ANY_ADDRESS:
            raise ValueError(f"host {self.host} is no address that routers could reach; auto takes the node's own")
        return self

    @property
    def needs_key(self) -> bool:
        """Whether other machines could use the engines without a key although the settings do not permit it."""
        return not is_loopback(self.host) and self.api_key is None and not self.allow_unauthenticated

    @model_validator(mode="after")
    def _check_lease(self) -> EngineSettings:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError("lease_s must be at least twice heartbeat_s, or one late heartbeat takes a replica out")
        return self


class RaySettings(Frozen):
    """The Ray cluster: one started on this machine for the run, or an existing one."""

    address: str | None = None
    """None starts a cluster that ends with the command; `auto` or an address joins an existing one."""
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    object_store_bytes: Annotated[int, Field(ge=75 * 2**20)] | None = None
    namespace: Name = "serving"
    let_anyone_on_the_network_run_code: bool = False
    """Required to use a Ray cluster without token authentication. Anyone who can reach its ports can then run code as
    the cluster's user."""


class Settings(Frozen):
    """All settings. The keys of `models` are the model names that answers carry."""

    models: Annotated[dict[Name, ModelSettings], Field(min_length=1)]
    engine: EngineSettings = EngineSettings()
    router: RouterSettings = RouterSettings()
    billing: BillingSettings = BillingSettings()
    ocr: OcrSettings = OcrSettings()
    ray: RaySettings = RaySettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _check_names(self) -> Settings:
        owners = [(alias, name) for name, model in self.models.items() for alias in (name, *model.aliases)]
        for alias, count in Counter(alias for alias, _ in owners).items():
            if count > 1:
                where = ", ".join(owner for name, owner in owners if name == alias)
                raise ValueError(f"models: the name {alias!r} is given twice ({where})")
        return self

    @model_validator(mode="after")
    def _check_ocr(self) -> Settings:
        is_open = self.router.keys_file is None and not self.ocr.allow_unauthenticated
        if self.ocr.enabled and not is_loopback(self.ocr.host) and is_open:
            raise ValueError(
                f"ocr.host {self.ocr.host} can be reached by others and no API keys are required; set "
                "router.keys_file, or ocr.allow_unauthenticated: true if the network is trusted"
            )
        return self

    @model_validator(mode="after")
    def _check_costs(self) -> Settings:
        unknown = sorted(set(self.billing.replica_hour_dollars) - set(self.models))
        if unknown:
            raise ValueError(f"billing.replica_hour_dollars: there is no model {', '.join(map(repr, unknown))}")
        return self

    def find_model(self, name: str) -> str | None:
        """Return the canonical name for a model name or alias, or None if it is unknown."""
        if name in self.models:
            return name
        return next((key for key, model in self.models.items() if name in model.aliases), None)


def load_settings(file: Path, environ: Mapping[str, str] | None = None) -> Settings:
    """Read a settings file, overridden by the environment.

    Raises:
        SettingsError: the settings are invalid; the message has one line per problem with source, key and reason.
    """
    given = read_yaml(file, Settings.model_fields)
    origins = overlay(given, os.environ if environ is None else environ, Settings.model_fields)
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [_explain(problem, file, origins) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from error


def fill_keys(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """Generate keys for engines and metrics ports that have none and that other users or machines could reach.

    Returns:
        The settings for every process of the stack, and the generated keys by name, `engine` and `metrics`.
    """
    engine, telemetry, has_keys = settings.engine, settings.telemetry, settings.router.keys_file is not None
    keys: dict[str, str] = {}
    if engine.needs_key or (has_keys and engine.api_key is None and not engine.allow_unauthenticated):
        keys["engine"] = secrets.token_urlsafe(32)
        engine = engine.model_copy(update={"api_key": SecretStr(keys["engine"])})
    if has_keys and telemetry.metrics_key is None:
        keys["metrics"] = secrets.token_urlsafe(32)
        telemetry = telemetry.model_copy(update={"metrics_key": SecretStr(keys["metrics"])})
    return settings.model_copy(update={"engine": engine, "telemetry": telemetry}), keys


def keep_keys(before: Settings, after: Settings) -> Settings:
    """Return reloaded settings with the keys that were generated for the running stack."""
    engine, telemetry = after.engine, after.telemetry
    if engine.api_key is None:
        engine = engine.model_copy(update={"api_key": before.engine.api_key})
    if telemetry.metrics_key is None:
        telemetry = telemetry.model_copy(update={"metrics_key": before.telemetry.metrics_key})
    return after.model_copy(update={"engine": engine, "telemetry": telemetry})


def dump_settings(settings: Settings) -> str:
    """Return the effective settings as YAML with secrets masked."""
    return yaml.safe_dump(_mask(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _mask(value: Any, key: str = "") -> Any:
    """Mask environment variables and engine arguments whose names suggest a secret; they have no secret type."""
    if isinstance(value, dict):
        return {name: _mask(part, str(name)) for name, part in value.items()}
    return _MASK if value and _SECRET_NAME.search(key) and isinstance(value, str) else value


def _explain(problem: Any, file: Path, origins: Mapping[tuple[str, ...], str]) -> str:
    path = tuple(str(part) for part in problem["loc"])
    # A rule that involves several keys is reported for the section: any of them may be the wrong one.
    variables = [name for place, name in origins.items() if place[: len(path)] == path or path[: len(place)] == place]
    source = f"environment {', '.join(variables)}" if variables and path else str(file)
    reason = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return f"{source}: {'.'.join(path) or 'settings'}: {reason}"
