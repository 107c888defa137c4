"""How much a measurement repeats itself: BENCHMARK_EFFORT is `full`, or `quick` for a third of the rounds."""

from __future__ import annotations

import os
from enum import StrEnum


class Effort(StrEnum):
    FULL = "full"
    QUICK = "quick"


VARIABLE = "BENCHMARK_EFFORT"


def rounds(full: int) -> int:
    """So many in a full run, a third of it in a quick one, and two at least: the first often pays for both."""
    if os.environ.get(VARIABLE, Effort.FULL) == Effort.FULL:
        return full
    return min(full, max(2, round(full / 3)))
