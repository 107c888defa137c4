"""Distributions of times: exact quantiles of what one process saw, and histograms that several can put together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_GROWTH = 1.02
"""Each bucket's upper edge over its lower one: a quantile of a histogram is right to about a hundredth."""
_SMALLEST_S = 1e-5


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that so large a part of all is no greater than; NaN of nothing. Needs no order."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(part * len(ordered)) - 1))]


def thin(values: Sequence[float], number: int = 51) -> list[float]:
    """The distribution as so many quantiles at even steps from the least to the greatest, for a plot; [] of nothing."""
    if not values:
        return []
    ordered = sorted(values)
    places = (round(index * (len(ordered) - 1) / (number - 1)) for index in range(number))
    return [round(ordered[place], 6) for place in places]


class Histogram:
    """Counts in buckets that grow by a constant factor. Adding two is adding their counts."""

    def __init__(self, counts: Mapping[int, int] | None = None, total: float = 0.0) -> None:
        self.counts: Counter[int] = Counter(counts or {})
        self.total = total

    def add(self, value_s: float) -> None:
        """Put in one value; whatever is under 10 us counts as that."""
        self.counts[math.ceil(math.log(max(value_s, _SMALLEST_S) / _SMALLEST_S) / math.log(_GROWTH) - 1e-9)] += 1
        self.total += value_s

    def merge(self, other: Histogram) -> None:
        self.counts.update(other.counts)
        self.total += other.total

    def __len__(self) -> int:
        return self.counts.total()

    @property
    def mean(self) -> float:
        return self.total / len(self) if len(self) else math.nan

    def quantile(self, part: float) -> float:
        """Upper edge of the bucket in which it lies; NaN of nothing."""
        wanted = max(1, math.ceil(part * len(self)))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return _SMALLEST_S * _GROWTH**bucket
        return math.nan

    def dump(self) -> dict[str, object]:
        """For a message between processes; `load` reads it."""
        return {"counts": {str(bucket): count for bucket, count in self.counts.items()}, "total": self.total}

    @classmethod
    def load(cls, given: Mapping[str, object]) -> Histogram:
        counts, total = given["counts"], given["total"]
        assert isinstance(counts, Mapping)
        assert isinstance(total, int | float)
        return cls({int(bucket): int(count) for bucket, count in counts.items()}, float(total))

    def summary(self, parts: Iterable[float] = (0.5, 0.9, 0.95, 0.99)) -> dict[str, float]:
        """Mean and quantiles by name (`p50`), in seconds; without the keys when it is empty."""
        if not len(self):
            return {}
        return {"mean": self.mean, **{f"p{100 * part:g}": self.quantile(part) for part in parts}}
