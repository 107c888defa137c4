"""The telemetry and log sections of the settings: who hears of what the stack does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from serving.settings.base import ANY_ADDRESS, Frozen, is_loopback


class LogSettings(Frozen):
    """What is written to stderr. Never prompts, images or keys."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
    """`json` is an object a line; `text` is for a person's eyes."""
    requests: bool = True
    """One line at level info for every request that has ended."""


class TelemetrySettings(Frozen):
    """Metrics are always there; this is what else may be wanted."""

    metrics_host: str = "127.0.0.1"
    """Address of the ports that routers and OCR services serve metrics on; `auto` takes the node's own. One that other
    machines reach opens the metrics to them, engines' `/metrics` included, unless `metrics_key` is set."""
    metrics_key: SecretStr | None = None
    """What Prometheus has to bring as a bearer token. None: `serving up` makes one for the run when the router has
    keys, and says where it is."""
    targets_file: Path | None = None
    """Written by every router for Prometheus' `file_sd_configs`, for a Prometheus that cannot ask a router."""
    otlp_endpoint: str | None = None
    """`http://collector:4318`: where traces of requests go, over OTLP/HTTP. None traces nothing."""
    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The part of the requests that is traced."""

    @property
    def opens_metrics(self) -> bool:
        """Whether metrics are for whoever reaches their ports."""
        return self.metrics_key is None and not is_loopback(self.metrics_host)

    @property
    def traces_url(self) -> str | None:
        """Where spans are posted to, None when nothing is traced."""
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
        """Replicas run in other folders than the user's."""
        return file.expanduser().absolute() if file is not None else None
