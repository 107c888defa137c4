"""What the API process and its image workers say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from serving.plugin.images.geometry import Size
from serving.plugin.images.picture import Colour
from serving.plugin.modes.resolution import ResolutionMode


@dataclass(frozen=True, slots=True)
class ViewJob:
    """What is to be made of the file that follows as raw bytes.

    size: that the header promised, turned; the pixels must be of this size.
    memory_bytes: how long the shared memory is by now; the sender knows.
    """

    size: Size
    mode: ResolutionMode
    padding: Colour
    background: Colour
    formats: tuple[str, ...]
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has imported all it needs; said once, before the first job."""


@dataclass(frozen=True, slots=True)
class Done:
    """The views lie in the shared memory. seconds: how long it took."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The file is at fault, for this reason."""

    reason: str
