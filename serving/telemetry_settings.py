"""The telemetry and log sections of the settings: who hears of what the stack does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from serving.frozen import Frozen


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

    @field_validator("targets_file")
    @classmethod
    def _make_absolute(cls, file: Path | None) -> Path | None:
        """Replicas run in other folders than the user's."""
        return file.expanduser().absolute() if file is not None else None
