"""Settings: frozen models, and the only reader of YAML and of the environment.

A value comes from the file given with `--config`, overridden by the environment: `SERVING__ROUTER__PORT=9000` sets
`router.port`, `SERVING__MODELS__NANO__NUM_REPLICAS=2` sets `models.nano.num_replicas`. Whatever is not understood is
refused with the place it came from, the key and the reason.
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
"""In the place of a checkpoint: the small one that comes with the project."""

_SECRET_NAME = re.compile(r"token(?!s|izer)|secret|password|api_?key|credential", re.IGNORECASE)
_MASK = "**********"


class ImageSettings(Frozen):
    """Who decodes and cuts the pages of a replica."""

    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that do it outside the API process; 0 leaves it to that process's own threads."""
    queue: Annotated[int, Field(ge=1)] = 64
    """Pages that may wait for a worker."""
    queue_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """After so long without room in the queue a request is refused with 503."""
    work_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """After so long on one page a worker is given up, and the page with it."""

    def environment(self) -> dict[str, str]:
        """The same for the plugin, which a bare vLLM server configures by its environment."""
        return {f"SERVING_IMAGE_{name.upper()}": str(value) for name, value in self.model_dump().items()}


class AutoscalingSettings(Frozen):
    """Replicas that come and go with the work, queued and running."""

    min_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    target_load: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Work per replica that is aimed at, as a part of a replica's capacity."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _check_range(self) -> AutoscalingSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class ScriptSettings(Frozen):
    """A stand-in for vLLM in tests and benchmarks: an engine that answers in vLLM's shapes by a script, no model."""

    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Rate of one sequence; None is as fast as it goes."""
    prefill_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    output_tokens: Annotated[int, Field(ge=1)] = 64
    """Length of an answer when the request's `max_tokens` asks for no less."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    kv_tokens: Annotated[int, Field(ge=1)] = 65_536
    """Capacity that it tells the directory."""
    max_model_len: Annotated[int, Field(ge=1)] = 8192
    start_s: Annotated[float, Field(ge=0)] = 0.0
    failures: tuple[str, ...] = ()
    """What goes wrong, see serving/engine/scripted/failures.py."""


class ModelSettings(Frozen):
    """One model: what runs, the names it answers to, and the replicas that run it."""

    checkpoint: str
    """A directory, a Hugging Face repository, or `nano` for the checkpoint that comes with the project."""
    aliases: tuple[Name, ...] = ()
    num_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    autoscaling: AutoscalingSettings | None = None
    """In the place of a fixed `num_replicas`."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    resources_per_replica: dict[Name, Amount] = Field(default_factory=dict)
    """Ray's custom resources: with them only nodes that were given some take a replica."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments under vLLM's own names (`max_model_len`, `enable_chunked_prefill`, ...)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the replica's processes (`VLLM_...`, `OMP_...`)."""
    images: ImageSettings = ImageSettings()
    price: PriceSettings = PriceSettings()
    start_timeout_s: Annotated[float, Field(gt=0)] = 900
    script: ScriptSettings | None = None
    """Runs the scripted engine in the place of vLLM: for tests and benchmarks of everything around it."""

    @model_validator(mode="after")
    def _check_engine_args(self) -> ModelSettings:
        owned = {"model", "served_model_name", "host", "port", "api_key"} & {
            name.replace("-", "_") for name in self.engine_args
        }
        if owned:
            raise ValueError(f"engine_args may not set {sorted(owned)}: the stack sets them itself")
        return self


class EngineSettings(Frozen):
    """What all engine replicas share."""

    host: str = "127.0.0.1"
    """Address that replicas listen on and are known by; `auto` takes the node's own address."""
    api_key: SecretStr | None = None
    """Engines refuse requests without it; routers bring it. None: `serving up` makes one for the run when the router
    has keys or `host` can be reached from other machines."""
    allow_unauthenticated: bool = False
    """Required to run engines without a key where one would be made: everyone who reaches an engine may use it."""
    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    lease_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """A replica that has not been heard of for so long is no longer listed."""
    drain_s: Annotated[float, Field(ge=0)] = 60.0
    """How long running requests may go on after a replica was told to stop."""

    @model_validator(mode="after")
    def _check_address(self) -> EngineSettings:
        if self.host in ANY_ADDRESS:
            raise ValueError(f"host {self.host} is no address that routers could reach; auto takes the node's own")
        return self

    @property
    def needs_key(self) -> bool:
        """Whether other machines could use the engines without a key, and nobody has said that they may."""
        return not is_loopback(self.host) and self.api_key is None and not self.allow_unauthenticated

    @model_validator(mode="after")
    def _check_lease(self) -> EngineSettings:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError("lease_s must be at least twice heartbeat_s, or one late heartbeat takes a replica out")
        return self


class RaySettings(Frozen):
    """Where Ray comes from: a cluster of its own on this machine, or one that is there."""

    address: str | None = None
    """None starts a cluster that ends with the command; `auto` or an address joins one."""
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    object_store_bytes: Annotated[int, Field(ge=75 * 2**20)] | None = None
    namespace: Name = "serving"
    let_anyone_on_the_network_run_code: bool = False
    """Required to use a Ray cluster without token authentication: whoever reaches its ports runs code as its user."""


class Settings(Frozen):
    """The whole of it. `models` is keyed by the name that answers carry."""

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
                f"ocr.host {self.ocr.host} can be reached by others and nobody is asked for a key; set "
                "router.keys_file, or ocr.allow_unauthenticated: true if the network keeps them out"
            )
        return self

    @model_validator(mode="after")
    def _check_costs(self) -> Settings:
        unknown = sorted(set(self.billing.replica_hour_dollars) - set(self.models))
        if unknown:
            raise ValueError(f"billing.replica_hour_dollars: there is no model {', '.join(map(repr, unknown))}")
        return self

    def find_model(self, name: str) -> str | None:
        """The canonical name behind a name or alias, None if there is none."""
        if name in self.models:
            return name
        return next((key for key, model in self.models.items() if name in model.aliases), None)


def load_settings(file: Path, environ: Mapping[str, str] | None = None) -> Settings:
    """Read a settings file and the environment over it.

    Raises:
        SettingsError: with one line for every thing that is wrong: source, key, reason.
    """
    given = read_yaml(file, Settings.model_fields)
    origins = overlay(given, os.environ if environ is None else environ, Settings.model_fields)
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [_explain(problem, file, origins) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from error


def fill_keys(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """Give engines and metrics ports a key where the settings name none and other users or machines could reach them.

    Returns:
        The settings for every process of the stack, and the keys that were made, `engine` and `metrics`.
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
    """Settings that were read again, with the keys that the running stack was given."""
    engine, telemetry = after.engine, after.telemetry
    if engine.api_key is None:
        engine = engine.model_copy(update={"api_key": before.engine.api_key})
    if telemetry.metrics_key is None:
        telemetry = telemetry.model_copy(update={"metrics_key": before.telemetry.metrics_key})
    return after.model_copy(update={"engine": engine, "telemetry": telemetry})


def dump_settings(settings: Settings) -> str:
    """The effective settings as YAML, secrets masked."""
    return yaml.safe_dump(_mask(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _mask(value: Any, key: str = "") -> Any:
    """Secrets that have no type of their own: variables of replicas and engine arguments that are named like one."""
    if isinstance(value, dict):
        return {name: _mask(part, str(name)) for name, part in value.items()}
    return _MASK if value and _SECRET_NAME.search(key) and isinstance(value, str) else value


def _explain(problem: Any, file: Path, origins: Mapping[tuple[str, ...], str]) -> str:
    path = tuple(str(part) for part in problem["loc"])
    # A rule over several keys is told at the section: any of them may be the one at fault.
    variables = [name for place, name in origins.items() if place[: len(path)] == path or path[: len(place)] == place]
    source = f"environment {', '.join(variables)}" if variables and path else str(file)
    reason = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return f"{source}: {'.'.join(path) or 'settings'}: {reason}"
