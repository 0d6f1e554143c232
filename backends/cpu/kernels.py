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

IMPLEMENTATION: Final = "numba"
BLOCK: Final = 1024  # elements: 4 KiB of fp32 at a time for conversions, 8 * 8 * 16 for square_sum

_KIND_NONE, _KIND_FLOAT, _KIND_BFLOAT16, _KIND_FLOAT16 = 0, 1, 2, 3
_KINDS: Final = {torch.float32: _KIND_FLOAT, torch.bfloat16: _KIND_BFLOAT16, torch.float16: _KIND_FLOAT16}
_FLOAT: Final = (torch.float32,)
_NARROW: Final = (torch.bfloat16, torch.float16)
_ANY: Final = (torch.float32, torch.bfloat16, torch.float16)
_BOOL: Final = (torch.bool,)
_ADDRESS: Final = types.int64


@njit(types.void(_ADDRESS, _ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def _widen(destination: int, source: int, count: int, kind: int) -> None:
    """fp32 copies of `count` elements of any kind."""
    output = floats_at(destination)
    if kind == _KIND_FLOAT:
        floats = floats_at(source)
        for i in range(count):
            output[i] = floats[i]
    elif kind == _KIND_BFLOAT16:
        halves = halves_at(source)
        for i in range(count):
            output[i] = widen_bfloat16(halves[i])
    else:
        halves = halves_at(source)
        for i in range(count):
            output[i] = widen_float16(halves[i])


@njit(types.void(_ADDRESS, _ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def _narrow(destination: int, source: int, count: int, kind: int) -> None:
    """`count` fp32 elements rounded to 16 bits."""
    floats = floats_at(source)
    output = halves_at(destination)
    if kind == _KIND_BFLOAT16:
        for i in range(count):
            output[i] = narrow_bfloat16(floats[i])
    else:
        for i in range(count):
            output[i] = narrow_float16(floats[i])


@njit(
    types.void(*[_ADDRESS] * 8, types.int64, types.int64, types.int64, types.boolean),
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
        if gradient_kind == _KIND_FLOAT:
            gradient = floats_at(gradient_at + 4 * begin)
        else:
            _widen(scratch.ctypes.data, gradient_at + 2 * begin, size, gradient_kind)
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
        if low_kind != _KIND_NONE:
            _narrow(low_at + 2 * begin, weight_at + 4 * begin, size, low_kind)


@njit(types.void(_ADDRESS, _ADDRESS, _ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def _square_sum(result_at: int, values_at: int, scale_at: int, count: int, kind: int) -> None:
    """Fold each block onto its eighths until sixteen sums are left: pairwise, and every step is a vector loop."""
    scale = floats_at(scale_at)[0]
    width = 4 if kind == _KIND_FLOAT else 2
    scratch = np.empty(BLOCK, np.float32)
    sums = np.empty(BLOCK // 8, np.float32)
    total = 0.0  # blocks meet in fp64: beyond a block, rounding no longer grows with n
    found = False
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        if kind == _KIND_FLOAT and size == BLOCK:
            values = floats_at(values_at + 4 * begin)
        else:
            values = floats_at(scratch.ctypes.data)
            _widen(scratch.ctypes.data, values_at + width * begin, size, kind)
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
    types.void(_ADDRESS, _ADDRESS, _ADDRESS, types.int64, types.int64, types.int64),
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
    if destination_kind == _KIND_FLOAT:
        if source_kind == _KIND_FLOAT:
            for i in range(count):
                wide[i] = floats[i] * scale
        elif source_kind == _KIND_BFLOAT16:
            for i in range(count):
                wide[i] = widen_bfloat16(halves[i]) * scale
        else:
            for i in range(count):
                wide[i] = widen_float16(halves[i]) * scale
    elif destination_kind == _KIND_BFLOAT16:
        if source_kind == _KIND_FLOAT:
            for i in range(count):
                narrow[i] = narrow_bfloat16(floats[i] * scale)
        elif source_kind == _KIND_BFLOAT16:
            for i in range(count):
                narrow[i] = narrow_bfloat16(widen_bfloat16(halves[i]) * scale)
        else:
            for i in range(count):
                narrow[i] = narrow_bfloat16(widen_float16(halves[i]) * scale)
    else:
        if source_kind == _KIND_FLOAT:
            for i in range(count):
                narrow[i] = narrow_float16(floats[i] * scale)
        elif source_kind == _KIND_BFLOAT16:
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
        _address("adamw", "weight", weight, _FLOAT, count),
        _address("adamw", "gradient", gradient, _ANY, count),
        _address("adamw", "exp_avg", exp_avg, _FLOAT, count),
        _address("adamw", "exp_avg_sq", exp_avg_sq, _FLOAT, count),
        0 if low is None else _address("adamw", "low", low, _NARROW, count),
        _address("adamw", "scalars", scalars, _FLOAT, len(ADAMW_SCALARS)),
        _address("adamw", "gradient_scale", gradient_scale, _FLOAT, 1),
        _address("adamw", "keep", keep, _BOOL, 1),
        count,
        _KINDS[gradient.dtype],
        _KIND_NONE if low is None else _KINDS[low.dtype],
        decoupled,
    )
    return weight, exp_avg, exp_avg_sq, low


def square_sum(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares and a finite check in one pass; see `reference.square_sum`."""
    count = values.numel()
    result = torch.empty(2, dtype=torch.float32)
    _square_sum(
        result.data_ptr(),
        _address("square_sum", "values", values, _ANY, count),
        _address("square_sum", "scale", scale, _FLOAT, 1),
        count,
        _KINDS[values.dtype],
    )
    return result


def scale_cast(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    """Scale in fp32 and round once into the dtype of `destination`; see `reference.scale_cast`."""
    count = destination.numel()
    _scale_cast(
        _address("scale_cast", "destination", destination, _ANY, count),
        _address("scale_cast", "source", source, _ANY, count),
        _address("scale_cast", "scale", scale, _FLOAT, 1),
        count,
        _KINDS[destination.dtype],
        _KINDS[source.dtype],
    )
    return destination


def cpu_kernels() -> tuple[Kernel, ...]:
    """The compiled kernels of the processor."""
    return tuple(
        Kernel(name, IMPLEMENTATION, function, priority=100)
        for name, function in (("adamw", adamw), ("square_sum", square_sum), ("scale_cast", scale_cast))
    )


def _address(kernel: str, argument: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], count: int) -> int:
    """The address of a tensor's elements, once it is known that compiled code may touch them."""
    if tensor.numel() == count and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.is_cpu:
        return tensor.data_ptr()
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    raise ValueError(
        f"kernel {kernel!r} got {argument} as {layout} {str(tensor.dtype).removeprefix('torch.')}"
        f"{list(tensor.shape)} on {tensor.device}, wanted contiguous {names}[{count}] on cpu; "
        f"pass vectors of one length, and cast them with 'scale_cast' where the dtype differs"
    )
