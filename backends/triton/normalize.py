"""Matrices divided by their Frobenius norms: read twice and written once, and nothing overflows or vanishes.

A norm is taken of the matrix times a power of two that brings its largest element near 1, which rounds nothing. The
power is found on the way: sums begun with another one are taken along by the ratio of the two, a power of two as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.triton.launch import TYPE_NAMES, Variant, interpreting, launch
from windlass.backends.triton.numbers import round_to, widen

BLOCK: Final = 4096  # elements
PARTS: Final = 1024  # into which a matrix is divided at most; each is measured by a program of its own
_LEAST: Final = tl.constexpr(1)  # biased exponents of powers of two whose inverses are normal numbers too
_MOST: Final = tl.constexpr(253)


@triton.jit
def _power(exponent):  # type: ignore[no-untyped-def]
    """2^(exponent - 127), for an exponent between 1 and 254."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _square_of_ratio(exponent, other):  # type: ignore[no-untyped-def]
    """(2^exponent / 2^other)^2 for an exponent that is not larger; from 2^-120 on it adds nothing, however small."""
    return _power(127 + 2 * tl.maximum(exponent - other, -60))


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    stack,  # [batch, count]
    exponents,  # [batch, parts], int32: of the power of two that a part was multiplied by, plus 127
    squares,  # [batch, parts]: the sum of its squares then
    count,
    parts,
    rounds,  # blocks of each part
    INTERPRETED: tl.constexpr,  # rounds once more for Triton's interpreter, else 0
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % parts
    stack += (program // parts).to(tl.int64) * count
    at = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exponent = part * 0 + _MOST
    total = exponent.to(tl.float32) * 0.0
    for _ in range(0, rounds if INTERPRETED == 0 else INTERPRETED):
        x = widen(tl.load(stack + at, mask=at < count, other=0.0))
        largest = tl.max(tl.abs(x), axis=0)
        # What is not finite has the exponent 255; it makes the sum so, whatever a maximum says of nan.
        needed = 254 - ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF)
        smaller = tl.minimum(exponent, tl.maximum(needed, _LEAST))
        scaled = x * _power(smaller)
        total = total * _square_of_ratio(smaller, exponent) + tl.sum(scaled * scaled, axis=0)
        exponent = smaller
        at += tl.cast(parts, tl.int64) * BLOCK
    tl.store(exponents + program, exponent)
    tl.store(squares + program, total)


@triton.jit
def _divide(  # type: ignore[no-untyped-def]
    stack,
    out,  # as stack
    exponents,
    squares,
    count,
    parts,
    blocks,  # of a matrix
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    matrix = (program // blocks).to(tl.int64)
    at = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Before the barriers of the sums below, so that it is on its way meanwhile.
    x = widen(tl.load(stack + matrix * count + at, mask=at < count, other=0.0))
    part = tl.arange(0, PARTS)
    known = part < parts
    each = tl.load(exponents + matrix * parts + part, mask=known, other=_MOST)
    sums = tl.load(squares + matrix * parts + part, mask=known, other=0.0)
    exponent = tl.min(each, axis=0)
    norm = tl.sqrt_rn(tl.sum(sums * _square_of_ratio(exponent, each), axis=0))
    norm = tl.where(norm == 0.0, 1.0, norm)
    norm = tl.where(norm < float("inf"), norm, float("nan"))  # so that one inf makes nan of all of its matrix
    y = tl.div_rn(x * _power(exponent), norm)
    tl.store(out + matrix * count + at, round_to(y, out.dtype.element_ty), mask=at < count)


def normalize(
    stack: Tensor,  # [b, n, m], contiguous, fp32, bf16 or fp16
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """Each matrix divided by its Frobenius norm, in fp32, and rounded once; zeros stay zeros, and a matrix that is not
    finite becomes nan. The order of summation depends on n m only."""
    out = torch.empty_like(stack, dtype=dtype)
    if stack.numel() == 0:
        return out
    batch, count = stack.shape[0], stack.shape[1] * stack.shape[2]
    blocks = -(-count // BLOCK)
    parts = min(blocks, PARTS)
    rounds = -(-blocks // parts)
    exponents = torch.empty((batch, parts), dtype=torch.int32, device=stack.device)
    squares = torch.empty((batch, parts), dtype=torch.float32, device=stack.device)
    measure = _MEASURE[stack.dtype]
    if interpreting():  # an argument is a vector of one element there, which is no bound of a range
        measure = replace(measure, constants=measure.constants | {"INTERPRETED": rounds})
    launch(
        measure, (batch * parts,), stack.device,
        stack=stack, exponents=exponents, squares=squares, count=count, parts=parts, rounds=rounds,
    )  # fmt: skip
    launch(
        _DIVIDE[stack.dtype, dtype], (batch * blocks,), stack.device,
        stack=stack, out=out, exponents=exponents, squares=squares, count=count, parts=parts, blocks=blocks,
    )  # fmt: skip
    return out


def _make_measure(dtype: torch.dtype) -> Variant:
    return Variant(
        name=f"measure {TYPE_NAMES[dtype]}",
        function=_measure,
        signature={"stack": f"*{TYPE_NAMES[dtype]}", "exponents": "*i32", "squares": "*fp32"}
        | dict.fromkeys(("count", "parts", "rounds"), "i32"),
        constants={"INTERPRETED": 0, "BLOCK": BLOCK},
        num_warps=8,
        aligned=("stack", "exponents", "squares", "count"),
    )


def _make_divide(dtype: torch.dtype, out: torch.dtype) -> Variant:
    return Variant(
        name=f"divide {TYPE_NAMES[dtype]} to {TYPE_NAMES[out]}",
        function=_divide,
        signature={"stack": f"*{TYPE_NAMES[dtype]}", "out": f"*{TYPE_NAMES[out]}"}
        | {"exponents": "*i32", "squares": "*fp32"}
        | dict.fromkeys(("count", "parts", "blocks"), "i32"),
        constants={"BLOCK": BLOCK, "PARTS": PARTS},
        num_warps=8,
        aligned=("stack", "out", "exponents", "squares", "count"),
    )


_MEASURE: Final = {dtype: _make_measure(dtype) for dtype in TYPE_NAMES}
_DIVIDE: Final = {(dtype, out): _make_divide(dtype, out) for dtype in TYPE_NAMES for out in TYPE_NAMES}
KERNELS: Final[tuple[Kernel, ...]] = ()  # it is a part of others, with no schema of its own
VARIANTS: Final[tuple[Variant, ...]] = (*_MEASURE.values(), *_DIVIDE.values())
