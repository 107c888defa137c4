"""How much a measurement repeats itself: BENCHMARK_EFFORT is `full`, or `quick` for a quarter of the rounds."""

from __future__ import annotations

import os
from enum import StrEnum


class Effort(StrEnum):
    FULL = "full"
    QUICK = "quick"


VARIABLE = "BENCHMARK_EFFORT"


def rounds(full: int, least: int = 2) -> int:
    """So many in a full run; in a quick one a quarter, two at least, where the first may pay for what comes once."""
    if os.environ.get(VARIABLE, Effort.FULL) == Effort.FULL:
        return full
    return min(full, max(least, round(full / 4)))
