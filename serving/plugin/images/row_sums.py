"""Weighted sums of a picture's rows in fixed point, many values side by side in the CPU's vector registers.

LLVM's own vectoriser writes every partial sum back to memory. Told the width, it keeps them in registers, whatever
vectors the CPU has: a third of the time. Importing numba is slow; import this late.
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
"""Values that are summed side by side: eight registers of AVX2, of sixteen."""

Bounds = npt.NDArray[np.int64]
Weights = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_INT = ir.IntType(32)
_INTS, _BYTES = ir.VectorType(_INT, LANES), ir.VectorType(ir.IntType(8), LANES)


def sum_rows(rows: Bytes, bounds: Bounds, weights: Weights, result: Bytes) -> None:
    """result[r] = the weighted sum of the rows that the bounds name, rounded and clipped to a byte.

    Args:
        rows: (num_in, length), contiguous.
        bounds: (num_out, 2), of each new row the first that goes into it and how many do.
        weights: (num_out, most of them), times 2^WEIGHT_BITS; a row's absolute weights sum up to less than 2.
        result: (num_out, length), contiguous, written.
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
    """result[:LANES] = the sum of rows[tap * stride :][:LANES] * weights[tap], for each of the weights."""

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


@numba.njit(nogil=True)  # compiled in half a second at the first call; a cache would need a place to write to
def _sum_rows(rows: Bytes, bounds: Bounds, weights: Weights, result: Bytes) -> None:
    length = rows.shape[1]
    source = rows.reshape(-1)
    for row in range(len(result)):
        first, count = bounds[row]
        window, row_weights, target = source[first * length :], weights[row, :count], result[row]
        for begin in range(0, length, LANES):
            place = min(begin, length - LANES)  # the last overlaps the one before
            _sum_lanes(window[place:], length, row_weights, target[place:])
