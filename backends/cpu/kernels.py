"""The processor's kernels, compiled by numba: one pass over memory, one thread, bits that do not depend on slicing.

Multiplications and additions are never contracted, so each element goes through the same roundings in the
vector body of a loop and in its tail, in the order of the reference. (The square root is the one of IEEE 754;
the one torch uses on vectors may be off in the last place, and there the reference differs.) 16-bit gradients are
converted in blocks that stay in the first-level cache. Kernels take addresses: a call costs a few
microseconds, and the interpreter's lock is free while it runs.

A scratch vector lives as long as its name is used, pointers into it do not count: so each loop that goes
through such a pointer also names the vector.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.reference import ADAMW_SCALARS
from windlass.backends.cpu.bits import (
    bytes_at,
    floats_at,
    halves_at,
    narrow_bfloat16,
    narrow_float16,
    widen_bfloat16,
    widen_float16,
)
from windlass.backends.cpu.momentum import momentum_blend, scale_decay_update
from windlass.backends.cpu.polar import polar_kernels
from windlass.backends.cpu.vectors import (
    ADDRESS,
    ANY,
    BLOCK,
    BOOL,
    FLOAT,
    KIND_BFLOAT16,
    KIND_FLOAT,
    KIND_NONE,
    KINDS,
    NARROW,
    address_of,
    narrow_vector,
    widen_vector,
)

IMPLEMENTATION: Final = "numba"


@njit(
    types.void(*[ADDRESS] * 8, types.int64, types.int64, types.int64, types.boolean),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _adamw(
    weight_at: int,
    gradient_at: int,
    exp_avg_at: int,
    exp_avg_sq_at: int,
    low_at: int,
    scalars_at: int,
    gradient_scale_at: int,
    keep_at: int,
    count: int,
    gradient_kind: int,
    low_kind: int,
    decoupled: bool,
) -> None:
    if bytes_at(keep_at)[0] == 0:
        return
    scalars = floats_at(scalars_at)
    lr, rest1, beta2, rest2 = scalars[0], scalars[2], scalars[3], scalars[4]  # as ADAMW_SCALARS names them
    eps, decay, correction1, root2 = scalars[5], scalars[6], scalars[7], np.sqrt(scalars[8])
    scale = floats_at(gradient_scale_at)[0]
    shrink = np.float32(1) - lr * decay if decoupled else np.float32(1)
    step = lr / correction1
    scratch = np.empty(BLOCK, np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        weight = floats_at(weight_at + 4 * begin)
        exp_avg = floats_at(exp_avg_at + 4 * begin)
        exp_avg_sq = floats_at(exp_avg_sq_at + 4 * begin)
        if gradient_kind == KIND_FLOAT:
            gradient = floats_at(gradient_at + 4 * begin)
        else:
            widen_vector(scratch.ctypes.data, gradient_at + 2 * begin, size, gradient_kind)
            gradient = floats_at(scratch.ctypes.data)
        for i in range(size):
            w = weight[i]
            g = gradient[i] * scale
            if not decoupled:
                g = g + decay * w
            m = exp_avg[i]
            m = m + rest1 * (g - m)
            v = beta2 * exp_avg_sq[i] + rest2 * (g * g)
            exp_avg[i] = m
            exp_avg_sq[i] = v
            weight[i] = w * shrink - step * (m / (np.sqrt(v) / root2 + eps))
        if low_kind != KIND_NONE:
            narrow_vector(low_at + 2 * begin, weight_at + 4 * begin, size, low_kind)


@njit(types.void(ADDRESS, ADDRESS, ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def _square_sum(result_at: int, values_at: int, scale_at: int, count: int, kind: int) -> None:
    """Fold each block onto its eighths until sixteen sums are left: pairwise, and every step is a vector loop."""
    scale = floats_at(scale_at)[0]
    width = 4 if kind == KIND_FLOAT else 2
    scratch = np.empty(BLOCK, np.float32)
    sums = np.empty(BLOCK // 8, np.float32)
    total = 0.0  # blocks meet in fp64: beyond a block, rounding no longer grows with n
    found = False
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        if kind == KIND_FLOAT and size == BLOCK:
            values = floats_at(values_at + 4 * begin)
        else:
            values = floats_at(scratch.ctypes.data)
            widen_vector(scratch.ctypes.data, values_at + width * begin, size, kind)
            for i in range(size, BLOCK):
                values[i] = np.float32(0)
        for row in range(8):  # eight vectors of sixteen, one after the other as they lie in memory
            at = 128 * row
            for i in range(at, at + 16):
                a, b, c, d = values[i] * scale, values[i + 16] * scale, values[i + 32] * scale, values[i + 48] * scale
                left = (a * a + b * b) + (c * c + d * d)
                a, b = values[i + 64] * scale, values[i + 80] * scale
                c, d = values[i + 96] * scale, values[i + 112] * scale
                sums[16 * row + i - at] = left + ((a * a + b * b) + (c * c + d * d))
        for i in range(16):
            left = (sums[i] + sums[i + 16]) + (sums[i + 32] + sums[i + 48])
            sums[i] = left + ((sums[i + 64] + sums[i + 80]) + (sums[i + 96] + sums[i + 112]))
        for i in range(4):
            sums[i] = (sums[i] + sums[i + 4]) + (sums[i + 8] + sums[i + 12])
        block_sum = (sums[0] + sums[1]) + (sums[2] + sums[3])
        total += np.float64(block_sum)
        # Squares do not cancel, so an inf or a nan leaves its mark on the sum of its block; an overflow does too.
        if not np.isfinite(block_sum):
            for i in range(BLOCK):
                found |= not np.isfinite(values[i])
    result = floats_at(result_at)
    result[0] = np.float32(total)
    result[1] = np.float32(1) if found else np.float32(0)


@njit(
    types.void(ADDRESS, ADDRESS, ADDRESS, types.int64, types.int64, types.int64),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _scale_cast(
    destination_at: int, source_at: int, scale_at: int, count: int, destination_kind: int, source_kind: int
) -> None:
    scale = floats_at(scale_at)[0]
    # A loop for each pair: going through a scratch vector would wait for memory in bursts and be twice as slow.
    floats, halves = floats_at(source_at), halves_at(source_at)
    wide, narrow = floats_at(destination_at), halves_at(destination_at)
    if destination_kind == KIND_FLOAT:
        if source_kind == KIND_FLOAT:
            for i in range(count):
                wide[i] = floats[i] * scale
        elif source_kind == KIND_BFLOAT16:
            for i in range(count):
                wide[i] = widen_bfloat16(halves[i]) * scale
        else:
            for i in range(count):
                wide[i] = widen_float16(halves[i]) * scale
    elif destination_kind == KIND_BFLOAT16:
        if source_kind == KIND_FLOAT:
            for i in range(count):
                narrow[i] = narrow_bfloat16(floats[i] * scale)
        elif source_kind == KIND_BFLOAT16:
            for i in range(count):
                narrow[i] = narrow_bfloat16(widen_bfloat16(halves[i]) * scale)
        else:
            for i in range(count):
                narrow[i] = narrow_bfloat16(widen_float16(halves[i]) * scale)
    else:
        if source_kind == KIND_FLOAT:
            for i in range(count):
                narrow[i] = narrow_float16(floats[i] * scale)
        elif source_kind == KIND_BFLOAT16:
            for i in range(count):
                narrow[i] = narrow_float16(widen_bfloat16(halves[i]) * scale)
        else:
            for i in range(count):
                narrow[i] = narrow_float16(widen_float16(halves[i]) * scale)


def adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    gradient_scale: Tensor,
    keep: Tensor,
    low: Tensor | None,
    *,
    decoupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One AdamW update in place; see `reference.adamw`."""
    count = weight.numel()
    _adamw(
        address_of("adamw", "weight", weight, FLOAT, count),
        address_of("adamw", "gradient", gradient, ANY, count),
        address_of("adamw", "exp_avg", exp_avg, FLOAT, count),
        address_of("adamw", "exp_avg_sq", exp_avg_sq, FLOAT, count),
        0 if low is None else address_of("adamw", "low", low, NARROW, count),
        address_of("adamw", "scalars", scalars, FLOAT, len(ADAMW_SCALARS)),
        address_of("adamw", "gradient_scale", gradient_scale, FLOAT, 1),
        address_of("adamw", "keep", keep, BOOL, 1),
        count,
        KINDS[gradient.dtype],
        KIND_NONE if low is None else KINDS[low.dtype],
        decoupled,
    )
    return weight, exp_avg, exp_avg_sq, low


def square_sum(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares and a finite check in one pass; see `reference.square_sum`."""
    count = values.numel()
    result = torch.empty(2, dtype=torch.float32)
    _square_sum(
        result.data_ptr(),
        address_of("square_sum", "values", values, ANY, count),
        address_of("square_sum", "scale", scale, FLOAT, 1),
        count,
        KINDS[values.dtype],
    )
    return result


def scale_cast(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    """Scale in fp32 and round once into the dtype of `destination`; see `reference.scale_cast`."""
    count = destination.numel()
    _scale_cast(
        address_of("scale_cast", "destination", destination, ANY, count),
        address_of("scale_cast", "source", source, ANY, count),
        address_of("scale_cast", "scale", scale, FLOAT, 1),
        count,
        KINDS[destination.dtype],
        KINDS[source.dtype],
    )
    return destination


def cpu_kernels() -> tuple[Kernel, ...]:
    """The processor's kernels: those compiled by numba, and those made of matrix products."""
    compiled = tuple(
        Kernel(name, IMPLEMENTATION, function, priority=100)
        for name, function in (
            ("adamw", adamw),
            ("square_sum", square_sum),
            ("scale_cast", scale_cast),
            ("momentum_blend", momentum_blend),
            ("scale_decay_update", scale_decay_update),
        )
    )
    return (*compiled, *polar_kernels())
