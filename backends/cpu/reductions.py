"""Sums over ranks in rank order: each term is read once, the partial sums stay in the first-level cache.

The order is the contract: ((part of rank 0 + part of rank 1) + part of rank 2) + ..., in the dtype of the
output. Outputs of 16 bits are summed in fp32 and rounded once, to nearest even. The result for one element
depends on nothing but its terms: not on where it lies, nor on how long the vector is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numba import carray, njit, types
from torch import Tensor

from windlass.accelerator.interface import ReduceOp
from windlass.backends.cpu.bits import (
    floats_at,
    halves_at,
    narrow_bfloat16,
    narrow_float16,
    widen_bfloat16,
    widen_float16,
)

BLOCK: Final = 4096  # elements; 16 KiB of fp32 partial sums leave room for the terms in a cache of 32 KiB

_NARROW: Final = (torch.bfloat16, torch.float16)
_KIND_BFLOAT16, _KIND_FLOAT16 = 1, 2


@njit(types.void(types.int64, types.int64[::1], types.int64), nogil=True, cache=True)
def _sum_floats(destination: int, sources: Any, count: int) -> None:
    """fp32 terms to an fp32 sum, summed in a scratch block because the destination may be one of the terms."""
    scratch = np.empty(BLOCK, np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        first = carray(floats_at(sources[0] + 4 * begin), size)
        second = carray(floats_at(sources[1] + 4 * begin), size)
        for i in range(size):
            scratch[i] = first[i] + second[i]
        for rank in range(2, sources.size):
            term = carray(floats_at(sources[rank] + 4 * begin), size)
            for i in range(size):
                scratch[i] += term[i]
        output = carray(floats_at(destination + 4 * begin), size)
        for i in range(size):
            output[i] = scratch[i]


@njit(types.void(types.int64, types.int64[::1], types.int64, types.int64, types.boolean), nogil=True, cache=True)
def _sum_halves(destination: int, sources: Any, count: int, kind: int, narrow: bool) -> None:
    """16-bit terms to an fp32 sum, or back to their own dtype when `narrow`."""
    scratch = np.empty(BLOCK, np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        for rank in range(sources.size):
            term = carray(halves_at(sources[rank] + 2 * begin), size)
            if kind == _KIND_BFLOAT16:
                if rank == 0:
                    for i in range(size):
                        scratch[i] = widen_bfloat16(term[i])
                else:
                    for i in range(size):
                        scratch[i] += widen_bfloat16(term[i])
            elif rank == 0:
                for i in range(size):
                    scratch[i] = widen_float16(term[i])
            else:
                for i in range(size):
                    scratch[i] += widen_float16(term[i])
        if narrow:
            narrow_output = carray(halves_at(destination + 2 * begin), size)
            if kind == _KIND_BFLOAT16:
                for i in range(size):
                    narrow_output[i] = narrow_bfloat16(scratch[i])
            else:
                for i in range(size):
                    narrow_output[i] = narrow_float16(scratch[i])
        else:
            wide_output = carray(floats_at(destination + 4 * begin), size)
            for i in range(size):
                wide_output[i] = scratch[i]


def reduce_in_order(output: Tensor, terms: Sequence[Tensor], op: ReduceOp) -> None:
    """output[n] = terms[0][n] + terms[1][n] + ... from left to right, or their maximum, whose nan wins.

    The output may be one of the terms. Terms are contiguous and no wider than the output.
    """
    if len(terms) == 1:
        if terms[0].data_ptr() != output.data_ptr() or terms[0].dtype != output.dtype:
            output.copy_(terms[0])
        return
    source, target = terms[0].dtype, output.dtype
    if op == "sum" and source == target == torch.float32:
        _sum_floats(output.data_ptr(), _addresses(terms), output.numel())
    elif op == "sum" and source in _NARROW and target in (torch.float32, source):
        kind = _KIND_BFLOAT16 if source == torch.bfloat16 else _KIND_FLOAT16
        _sum_halves(output.data_ptr(), _addresses(terms), output.numel(), kind, target == source)
    else:
        _reduce_tensors(output, terms, op)


def _reduce_tensors(output: Tensor, terms: Sequence[Tensor], op: ReduceOp) -> None:
    """Any other dtype, and the maximum: rare and short, so a temporary vector does no harm."""
    dtype = torch.float32 if output.dtype in _NARROW else output.dtype
    total = terms[0].to(dtype, copy=True)
    for term in terms[1:]:
        total = total.add_(term.to(dtype)) if op == "sum" else torch.maximum(total, term.to(dtype))
    output.copy_(total)


def _addresses(terms: Sequence[Tensor]) -> Any:
    return np.array([term.data_ptr() for term in terms], dtype=np.int64)
