"""When users come: open-loop schedules, pure. Nobody waits for anybody's answer.

A schedule is decided before the first request is sent, by its seed: every process of a distributed run computes the
same one and takes each n-th arrival of it, so that the whole keeps its shape however many processes share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from itertools import count, islice, takewhile
from random import Random

_BURST_PERIOD_S = 20.0
_BURST_PART = 0.2
_BURST_FACTOR = 3.0
_QUIET_FACTOR = (1 - _BURST_PART * _BURST_FACTOR) / (1 - _BURST_PART)
"""Between bursts, so that the mean is the rate that was asked for."""
_SWING = 0.8
"""Of a day: from a fifth of the mean at night to 1.8 times at noon."""


class Shape(StrEnum):
    CONSTANT = "constant"
    """The same time between each two."""
    POISSON = "poisson"
    """Independent of each other, at a constant mean rate: what many users look like."""
    BURST = "burst"
    """Poisson, three times the mean rate for a fifth of every 20 s."""
    DAILY = "daily"
    """Poisson, a day with its night and noon in the length of the run."""


def rate_factor(shape: Shape, at_s: float, duration_s: float) -> float:
    """Rate at a time over the mean rate; its mean over whole periods is 1."""
    if shape is Shape.BURST:
        return _BURST_FACTOR if at_s % _BURST_PERIOD_S < _BURST_PART * _BURST_PERIOD_S else _QUIET_FACTOR
    if shape is Shape.DAILY:
        return 1 - _SWING * math.cos(2 * math.pi * at_s / duration_s)
    return 1.0


_PEAKS = {Shape.BURST: _BURST_FACTOR, Shape.DAILY: 1 + _SWING}


def schedule(shape: Shape, per_s: float, duration_s: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which users come, in order, all before `duration_s`.

    Raises:
        ValueError: the rate or the duration is not positive.
    """
    if per_s <= 0 or duration_s <= 0:
        raise ValueError("rate and duration must be positive")
    if shape is Shape.CONSTANT:
        return takewhile(lambda at_s: at_s < duration_s, (number / per_s for number in count()))
    return _poisson(
        per_s, duration_s, Random(seed), lambda at_s: rate_factor(shape, at_s, duration_s), _PEAKS.get(shape, 1.0)
    )


def _poisson(
    per_s: float, duration_s: float, random: Random, factor: Callable[[float], float], peak: float
) -> Iterator[float]:
    """Thinning (Lewis and Shedler, 1979): come at the peak's rate, and stay with the probability of the moment."""
    at_s = random.expovariate(per_s * peak)
    while at_s < duration_s:
        if random.random() * peak < factor(at_s):
            yield at_s
        at_s += random.expovariate(per_s * peak)


def share(times: Iterable[float], index: int, workers: int) -> Iterator[float]:
    """Every `workers`-th of them, beginning with number `index`."""
    return islice(times, index, None, workers)
