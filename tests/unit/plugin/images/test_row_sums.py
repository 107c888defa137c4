"""Sums of rows against the same in numpy's whole numbers."""

from __future__ import annotations

import numpy as np
import pytest

from serving.plugin.images.row_sums import LANES, WEIGHT_BITS, sum_rows


@pytest.mark.parametrize("length", [1, LANES - 1, LANES, LANES + 1, 3 * LANES, 3 * LANES + 5])
def test_sums_are_rounded_and_clipped_and_nothing_else_is_written(length: int) -> None:
    random = np.random.default_rng(length)
    rows = random.integers(0, 256, (9, length), dtype=np.uint8)
    bounds = np.array([[0, 1], [0, 9], [2, 4], [8, 1], [3, 0], [1, 6]])
    shares = random.uniform(-1, 1, (len(bounds), 9))
    shares *= random.uniform(0, 1.99, (len(bounds), 1)) / np.abs(shares).sum(1, keepdims=True)
    weights = (shares * (1 << WEIGHT_BITS)).astype(np.int32)
    sums = [
        (rows[first : first + count].astype(np.int64) * weights[number, :count, None]).sum(0)
        for number, (first, count) in enumerate(bounds)
    ]
    wanted = np.clip((np.array(sums) + (1 << WEIGHT_BITS - 1)) >> WEIGHT_BITS, 0, 255)
    memory = np.full((len(bounds) + 2) * length, 7, np.uint8)
    result = memory[length:-length].reshape(len(bounds), length)
    sum_rows(rows, bounds, weights, result)
    np.testing.assert_array_equal(result, wanted)
    assert (memory[:length] == 7).all()
    assert (memory[-length:] == 7).all()


def test_the_largest_sums_do_not_run_over() -> None:
    rows = np.full((2, LANES), 255, np.uint8)
    bounds, result = np.array([[0, 2], [0, 2]]), np.empty((2, LANES), np.uint8)
    most = (1 << WEIGHT_BITS) - 1
    sum_rows(rows, bounds, np.array([[most, most], [-most, -most]], np.int32), result)
    assert (result[0] == 255).all()
    assert (result[1] == 0).all()
