"""Weighted fixed-point sums of an image's rows, many values at a time in the CPU's vector registers.

LLVM's own vectoriser writes every partial sum back to memory. With an explicit width it keeps them in registers on any
CPU, which takes a third of the time. Importing numba is slow, so import this module late.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WEIGHT_BITS = 22
LANES = 64
"""Values that are summed at a time: they fill eight of the sixteen AVX2 registers."""

Bounds = npt.NDArray[np.int64]
Weights = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_INT = ir.IntType(32)
_INTS, _BYTES = ir.VectorType(_INT, LANES), ir.VectorType(ir.IntType(8), LANES)


def sum_rows(rows: Bytes, bounds: Bounds, weights: Weights, result: Bytes) -> None:
    """Set result[r] to the weighted sum of the rows within bounds[r], rounded and clipped to a byte.

    Args:
        rows: (num_in, length), contiguous.
        bounds: (num_out, 2), the first source row of each new row and the number of source rows.
        weights: (num_out, largest number), times 2^WEIGHT_BITS; the absolute weights of a row sum to less than 2.
        result: (num_out, length), contiguous, overwritten.
    """
    length = rows.shape[1]
    if length < LANES:
        wide = np.empty((len(result), LANES), np.uint8)
        _sum_rows(np.pad(rows, ((0, 0), (0, LANES - length))), bounds, weights, wide)
        result[:] = wide[:, :length]
    else:
        _sum_rows(rows, bounds, weights, result)


@intrinsic
def _sum_lanes(_: Any, rows: Any, stride: Any, weights: Any, result: Any) -> Any:  # a compiler's callback: types
    """Set result[:LANES] to the sum over all weights of rows[tap * stride :][:LANES] * weights[tap]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, values, target = (
            context.make_array(signature.args[number])(context, builder, args[number]) for number in (0, 2, 3)
        )
        (count,) = cgutils.unpack_tuple(builder, values.shape)
        sums = cgutils.alloca_once_value(builder, _all(1 << (WEIGHT_BITS - 1)))  # half of the last bit
        with cgutils.for_range(builder, count) as tap:
            begin = builder.gep(source.data, [builder.mul(tap.index, args[1])])
            pixels = builder.zext(builder.load(builder.bitcast(begin, _BYTES.as_pointer()), align=1), _INTS)
            weight = builder.load(builder.gep(values.data, [tap.index]))
            alone = builder.insert_element(ir.Constant(_INTS, ir.Undefined), weight, ir.Constant(_INT, 0))
            everywhere = builder.shuffle_vector(alone, ir.Constant(_INTS, ir.Undefined), _all(0))
            builder.store(builder.add(builder.load(sums), builder.mul(pixels, everywhere)), sums)
        rounded = builder.ashr(builder.load(sums), _all(WEIGHT_BITS))
        for sign, limit in ((">", _all(0)), ("<", _all(255))):
            rounded = builder.select(builder.icmp_signed(sign, rounded, limit), rounded, limit)
        builder.store(builder.trunc(rounded, _BYTES), builder.bitcast(target.data, _BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(rows, stride, weights, result), generate


def _all(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


@numba.njit(nogil=True)  # compiles in half a second at the first call; a cache would need a writable folder
def _sum_rows(rows: Bytes, bounds: Bounds, weights: Weights, result: Bytes) -> None:
    length = rows.shape[1]
    source = rows.reshape(-1)
    for row in range(len(result)):
        first, count = bounds[row]
        window, row_weights, target = source[first * length :], weights[row, :count], result[row]
        for begin in range(0, length, LANES):
            place = min(begin, length - LANES)  # the last block overlaps the one before
            _sum_lanes(window[place:], length, row_weights, target[place:])
