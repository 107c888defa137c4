"""The telemetry and log sections of the settings: who hears of what the stack does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AnyHttpUrl, Field, TypeAdapter, field_validator

from serving.frozen import Frozen

_URL = TypeAdapter(AnyHttpUrl)


class LogSettings(Frozen):
    """What is written to stderr. Never prompts, images or keys."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
    """`json` is an object a line; `text` is for a person's eyes."""
    requests: bool = True
    """One line at level info for every request that has ended."""


class TelemetrySettings(Frozen):
    """Metrics are always there; this is what else may be wanted."""

    targets_file: Path | None = None
    """Written by every router for Prometheus' `file_sd_configs`, for a Prometheus that cannot ask a router."""
    otlp_endpoint: str | None = None
    """Base URL of an OpenTelemetry collector (`http://collector:4318`): traces go there. None: no traces."""
    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Part of the requests that are traced; whoever sends a `traceparent` has decided for its own."""

    @field_validator("targets_file")
    @classmethod
    def _make_absolute(cls, file: Path | None) -> Path | None:
        """Replicas run in other folders than the user's."""
        return file.expanduser().absolute() if file is not None else None

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        """A URL that is none would be found out by a background thread, long after the start."""
        return str(_URL.validate_python(url)).rstrip("/") if url is not None else None
