"""square_sum and scale_cast.

A sum must not depend on how a device happens to schedule programs: each program adds a block of fixed size and leaves
its sum in memory, and a second launch, of one program, adds those in fp64.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.triton.launch import (
    IMPLEMENTATION,
    TYPE_NAMES,
    Variant,
    launch,
    launch_over,
    make_vector_variant,
    require,
)
from windlass.backends.triton.numbers import round_to, widen

SUM_ROWS: Final = 8
SUM_COLUMNS: Final = 1024
SUM_BLOCK: Final = SUM_ROWS * SUM_COLUMNS
"""Elements of a program: each of 256 threads has 32 of them on their way at once, and adds at most eight in a row."""
FINISH_BLOCK: Final = 8192
CAST_BLOCK: Final = 2048
_WIDE: Final = tl.constexpr(4)  # elements side by side in a thread, as in adamw
_ANY: Final = (torch.float32, torch.bfloat16, torch.float16)
_EXPONENT: Final = tl.constexpr(0x7F800000)


@triton.jit
def _is_finite(values: tl.tensor) -> tl.tensor:
    return (values.to(tl.int32, bitcast=True) & _EXPONENT) != _EXPONENT


@triton.jit
def _sum_block(
    sums: tl.tensor,
    flags: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    rest: tl.tensor,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = at < rest if MASKED else None
    other = 0.0 if MASKED else None
    block = widen(tl.load(values + at, mask=mask, other=other))
    scaled = block * tl.load(scale)
    total = tl.sum(tl.sum(scaled * scaled, axis=0), axis=0)
    tl.store(sums, total)
    # Squares do not cancel: an inf or a nan leaves its mark on the sum. So does an overflow, which is neither.
    if _is_finite(total):
        tl.store(flags, 0)
    else:
        tl.store(flags, tl.max(tl.max(tl.where(_is_finite(block), 0, 1), axis=0), axis=0))


@triton.jit(do_not_specialize=["count"])
def sum_blocks(
    sums: tl.tensor,
    flags: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sum of squares of one block, fp32, and 1 as its flag, int32, where a value is inf or nan."""
    block = tl.program_id(0)
    start = block.to(tl.int64) * (ROWS * COLUMNS)
    rest = count - start
    if rest >= ROWS * COLUMNS:
        _sum_block(sums + block, flags + block, values + start, scale, rest, False, ROWS, COLUMNS)
    else:
        _sum_block(sums + block, flags + block, values + start, scale, rest, True, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["count"])
def finish_sum(result: tl.tensor, sums: tl.tensor, flags: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Add the sums of all blocks; flags are looked at where the total says that there may be some."""
    at = tl.arange(0, BLOCK)
    start = 0
    totals = tl.zeros([BLOCK], tl.float64)
    while start < count:
        totals += tl.load(sums + start + at, mask=at < count - start, other=0.0).to(tl.float64)
        start += BLOCK
    total = tl.sum(totals, axis=0)
    tl.store(result, total.to(tl.float32))
    worst = tl.zeros([BLOCK], tl.int32)
    if total - total != 0:
        while start > 0:
            start -= BLOCK
            worst = tl.maximum(worst, tl.load(flags + start + at, mask=at < count - start, other=0))
    tl.store(result + 1, tl.max(worst, axis=0).to(tl.float32))


@triton.jit
def _cast_block(
    destination: tl.tensor,
    source: tl.tensor,
    scale: tl.tensor,
    rest: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.max_contiguous(tl.arange(0, BLOCK), _WIDE)
    mask = at < rest if MASKED else None
    values = widen(tl.load(source + at, mask=mask)) * tl.load(scale)
    tl.store(destination + at, round_to(values, destination.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def cast_blocks(
    destination: tl.tensor, source: tl.tensor, scale: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """One block of a vector, scaled and rounded once."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = count - start
    if rest >= BLOCK:
        _cast_block(destination + start, source + start, scale, rest, False, BLOCK)
    else:
        _cast_block(destination + start, source + start, scale, rest, True, BLOCK)


@cache
def make_sum_variant(values: torch.dtype) -> Variant:
    """The program that sums blocks of one dtype."""
    return Variant(
        name=f"square_sum of {TYPE_NAMES[values]}",
        function=sum_blocks,
        signature={
            "sums": "*fp32",
            "flags": "*i32",
            "values": f"*{TYPE_NAMES[values]}",
            "scale": "*fp32",
            "count": "i32",
            "ROWS": "constexpr",
            "COLUMNS": "constexpr",
        },
        constants={"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS},
        num_warps=8,
        aligned=("sums", "flags", "values"),
    )


FINISH: Final = Variant(
    name="square_sum, the sums of blocks",
    function=finish_sum,
    signature={"result": "*fp32", "sums": "*fp32", "flags": "*i32", "count": "i32", "BLOCK": "constexpr"},
    constants={"BLOCK": FINISH_BLOCK},
    num_warps=16,
    aligned=("result", "sums", "flags"),
)


@cache
def make_cast_variant(destination: torch.dtype, source: torch.dtype, *, aligned: bool = True) -> Variant:
    """The program for one pair of dtypes."""
    return make_vector_variant(
        f"scale_cast of {TYPE_NAMES[source]} to {TYPE_NAMES[destination]}",
        cast_blocks,
        {"destination": destination, "source": source},
        {"scale": "*fp32"},
        {"BLOCK": CAST_BLOCK},
        num_warps=4,
        aligned=aligned,
    )


VARIANTS: tuple[Variant, ...] = (
    *(make_sum_variant(values) for values in _ANY),
    FINISH,
    *(make_cast_variant(destination, source) for destination in _ANY for source in _ANY),
    make_cast_variant(torch.bfloat16, torch.float32, aligned=False),
)


def square_sum(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares and a finite check; see `reference.square_sum`."""
    count = values.numel()
    require("square_sum", "values", values, _ANY, count)
    require("square_sum", "scale", scale, (torch.float32,), 1)
    if count == 0:
        return torch.zeros(2, dtype=torch.float32, device=values.device)
    blocks = triton.cdiv(count, SUM_BLOCK)
    result, sums, flags = (
        torch.empty(length, dtype=dtype, device=values.device)
        for length, dtype in ((2, torch.float32), (blocks, torch.float32), (blocks, torch.int32))
    )
    given: dict[str, Any] = {"sums": sums, "flags": flags}
    device = values.device
    launch(make_sum_variant(values.dtype), (blocks,), device, values=values, scale=scale, count=count, **given)
    launch(FINISH, (1,), device, result=result, count=blocks, **given)
    return result


def scale_cast(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    """Scale in fp32 and round once into the dtype of `destination`; see `reference.scale_cast`."""
    count = destination.numel()
    require("scale_cast", "destination", destination, _ANY, count)
    require("scale_cast", "source", source, _ANY, count)
    require("scale_cast", "scale", scale, (torch.float32,), 1)
    variant = make_cast_variant(destination.dtype, source.dtype)
    launch_over(variant, count, destination.device, destination=destination, source=source, scale=scale)
    return destination


KERNELS: tuple[Kernel, ...] = (
    Kernel("square_sum", IMPLEMENTATION, square_sum),
    Kernel("scale_cast", IMPLEMENTATION, scale_cast),
)
