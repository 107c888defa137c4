"""Character error rate."""

from collections.abc import Sequence

import numpy as np


def edit_distance(left: str, right: str) -> int:
    """Return the fewest insertions, deletions and replacements of characters that turn `left` into `right`."""
    target = np.array([ord(char) for char in right], np.int64)
    steps = np.arange(len(right) + 1)
    row = steps.copy()
    for index, char in enumerate(left, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (target != ord(char)))
        # An insertion extends a cell of the same row: a running minimum once the column number is taken out.
        row = np.minimum.accumulate(np.concatenate([[index], best]) - steps) + steps
    return int(row[-1])


def character_error_rate(read: str, truth: str) -> float:
    """Return the edit distance per character of `truth`, which must not be empty."""
    return edit_distance(read, truth) / len(truth)


def mean_error_rate(reads: Sequence[str], truths: Sequence[str]) -> float:
    """Return the mean over pages of their character error rates."""
    return float(np.mean([character_error_rate(read, truth) for read, truth in zip(reads, truths, strict=True)]))
