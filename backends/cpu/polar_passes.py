"""Passes over memory between the matrix products of `polar`, compiled by numba: norm and scaling."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from windlass.backends.cpu.bits import (
    floats_at,
    halves_at,
    narrow_bfloat16,
    narrow_float16,
    widen_bfloat16,
    widen_float16,
)

KINDS: Final = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_LANES: Final = 64  # sums side by side: a fixed order, whatever the address
_ADDRESS: Final = types.int64


@njit(types.float64(_ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def _square_sum(values_at: int, count: int, kind: int) -> float:
    """In fp64, where squares of fp32 neither overflow nor vanish."""
    sums = np.zeros(_LANES, np.float64)
    whole = count - count % _LANES
    floats, halves = floats_at(values_at), halves_at(values_at)
    for begin in range(0, whole, _LANES):
        if kind == 1:
            for lane in range(_LANES):
                value = np.float64(floats[begin + lane])
                sums[lane] += value * value
        elif kind == 2:
            for lane in range(_LANES):
                value = np.float64(widen_bfloat16(halves[begin + lane]))
                sums[lane] += value * value
        else:
            for lane in range(_LANES):
                value = np.float64(widen_float16(halves[begin + lane]))
                sums[lane] += value * value
    total = 0.0
    for lane in range(_LANES):
        total += sums[lane]
    for i in range(whole, count):
        value = np.float64(
            floats[i] if kind == 1 else widen_bfloat16(halves[i]) if kind == 2 else widen_float16(halves[i])
        )
        total += value * value
    return total


@njit(
    types.void(_ADDRESS, _ADDRESS, types.int64, types.int64, types.int64, types.float64),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _scale(destination_at: int, source_at: int, count: int, destination_kind: int, kind: int, factor: float) -> None:
    """Multiplied in fp64, rounded to fp32, then to the destination's kind."""
    block = np.empty(1024, np.float32)
    for begin in range(0, count, 1024):
        size = min(1024, count - begin)
        if kind == 1:
            floats = floats_at(source_at + 4 * begin)
            for i in range(size):
                block[i] = np.float32(np.float64(floats[i]) * factor)
        elif kind == 2:
            halves = halves_at(source_at + 2 * begin)
            for i in range(size):
                block[i] = np.float32(np.float64(widen_bfloat16(halves[i])) * factor)
        else:
            halves = halves_at(source_at + 2 * begin)
            for i in range(size):
                block[i] = np.float32(np.float64(widen_float16(halves[i])) * factor)
        if destination_kind == 1:
            wide = floats_at(destination_at + 4 * begin)
            for i in range(size):
                wide[i] = block[i]
        elif destination_kind == 2:
            narrow = halves_at(destination_at + 2 * begin)
            for i in range(size):
                narrow[i] = narrow_bfloat16(block[i])
        else:
            narrow = halves_at(destination_at + 2 * begin)
            for i in range(size):
                narrow[i] = narrow_float16(block[i])


def normalize(matrix: Tensor, destination: Tensor) -> None:
    """Divide a contiguous matrix by its norm into one of any float dtype; zeros stay, what is not finite gives nan."""
    square = _square_sum(matrix.data_ptr(), matrix.numel(), KINDS[matrix.dtype])
    factor = 1.0 if square == 0 else 1 / float(np.sqrt(square)) if np.isfinite(square) else float("nan")
    kinds = (KINDS[destination.dtype], KINDS[matrix.dtype])
    _scale(destination.data_ptr(), matrix.data_ptr(), matrix.numel(), *kinds, factor)
