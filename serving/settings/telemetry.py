"""The telemetry and log sections of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from serving.settings.base import ANY_ADDRESS, Frozen, is_loopback


class LogSettings(Frozen):
    """What is logged to stderr. Prompts, images and keys are never logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
    """`json` writes one object per line; `text` is for reading by people."""
    requests: bool = True
    """Whether to log one line at level info for every finished request."""


class TelemetrySettings(Frozen):
    """Metrics ports, targets for Prometheus, and traces. Metrics cannot be switched off."""

    metrics_host: str = "127.0.0.1"
    """Address of the ports that routers and OCR services serve metrics on; `auto` is the node's own address. A
    non-loopback address opens the metrics to other machines, including the engines' `/metrics`, unless `metrics_key` is
    set."""
    metrics_key: SecretStr | None = None
    """Bearer token that Prometheus must send. None: `serving up` generates one for the run if the router has API keys,
    and prints the path of its file."""
    targets_file: Path | None = None
    """File that every router writes for Prometheus' `file_sd_configs`, for a Prometheus that cannot query a router."""
    otlp_endpoint: str | None = None
    """Where request traces are sent over OTLP/HTTP, for example `http://collector:4318`. None disables tracing."""
    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The fraction of requests that is traced."""

    @property
    def opens_metrics(self) -> bool:
        """Whether anyone who can reach the metrics ports may read the metrics."""
        return self.metrics_key is None and not is_loopback(self.metrics_host)

    @property
    def traces_url(self) -> str | None:
        """The URL that spans are posted to, or None if tracing is disabled."""
        return None if self.otlp_endpoint is None else f"{self.otlp_endpoint.rstrip('/')}/v1/traces"

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be the address of an OTLP/HTTP collector, like http://127.0.0.1:4318")
        if parts.username or parts.query or parts.fragment:
            raise ValueError("must be an address only; keys go into OTEL_EXPORTER_OTLP_HEADERS")
        return url

    @field_validator("metrics_host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if host in ANY_ADDRESS:
            raise ValueError(f"{host} is no address that Prometheus could be told; auto takes the node's own")
        return host

    @field_validator("targets_file")
    @classmethod
    def _make_absolute(cls, file: Path | None) -> Path | None:
        """Make paths absolute: replicas run in another working directory than the command that read the settings."""
        return file.expanduser().absolute() if file is not None else None
