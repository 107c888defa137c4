"""The messages between the API process and its image workers."""

from __future__ import annotations

from dataclasses import dataclass

from serving.plugin.images.geometry import Size
from serving.plugin.images.picture import Colour
from serving.plugin.modes.resolution import ResolutionMode


@dataclass(frozen=True, slots=True)
class ViewJob:
    """How to process the file that follows as raw bytes.

    size: displayed size according to the header, which the pixels must have.
    memory_bytes: current length of the shared memory.
    """

    size: Size
    mode: ResolutionMode
    padding: Colour
    background: Colour
    formats: tuple[str, ...]
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has imported everything; sent once, before the first job."""


@dataclass(frozen=True, slots=True)
class Done:
    """The views are in the shared memory. seconds: how long it took."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The file is invalid, for this reason."""

    reason: str
