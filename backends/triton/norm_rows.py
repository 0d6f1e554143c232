"""Programs of the norms: rows in registers, where they fit, so that memory is read once and written once; longer rows
go through in blocks.

RMSNorm is LayerNorm around zero: without a mean that is taken away (`CENTRED`). Loops are `while` loops, because the
interpreter does not take bounds that are no constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from windlass.backends.triton.numbers import round_to, widen


@triton.jit(do_not_specialize=["tokens"])
def normalize(
    output: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    input: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,  # size in fp32
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows of at most BLOCK elements."""
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = at < size
    mask = (row < tokens - first)[:, None] & inside[None, :]
    start = first.to(tl.int64) * size
    place = row[:, None] * size + at[None, :]
    x = widen(tl.load(input + start + place, mask=mask, other=0.0))
    if CENTRED:
        average = tl.div_rn(tl.sum(x, axis=1), count)
        x = tl.where(mask, x - average[:, None], 0.0)
        tl.store(mean + first + row, average, mask=row < tokens - first)
    variance = tl.div_rn(tl.sum(x * x, axis=1), count)
    root = tl.sqrt_rn(variance + eps)
    scale = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), root)
    tl.store(rstd + first + row, scale, mask=row < tokens - first)
    y = x * scale[:, None]
    if weight is not None:
        y = y * widen(tl.load(weight + at, mask=inside, other=0.0))[None, :]
    if bias is not None:
        y = y + widen(tl.load(bias + at, mask=inside, other=0.0))[None, :]
    tl.store(output + start + place, round_to(y, output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def differentiate(
    input_gradient: tl.tensor,
    weight_sums: tl.tensor,
    bias_sums: tl.tensor,
    output_gradient: tl.tensor,
    input: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Every num_programs-th group of ROWS rows. Its sums for weight and bias are its row of [programs, size]."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    row = tl.arange(0, ROWS)
    if weight is not None:
        factor = widen(tl.load(weight + at, mask=inside, other=0.0))[None, :]
    if weight_sums is not None:
        weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if bias_sums is not None:
        bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    first = program * ROWS
    while first < tokens:
        there = row < tokens - first
        mask = there[:, None] & inside[None, :]
        place = (first + row).to(tl.int64)[:, None] * size + at[None, :]
        g = widen(tl.load(output_gradient + place, mask=mask, other=0.0))
        x = widen(tl.load(input + place, mask=mask, other=0.0))
        scale = tl.load(rstd + first + row, mask=there, other=0.0)[:, None]
        if CENTRED:
            x = tl.where(mask, x - tl.load(mean + first + row, mask=there, other=0.0)[:, None], 0.0)
        normal = x * scale
        inner = g
        if weight is not None:
            inner = g * factor
        back = inner - normal * tl.div_rn(tl.sum(inner * normal, axis=1), count)[:, None]
        if CENTRED:
            back = back - tl.div_rn(tl.sum(inner, axis=1), count)[:, None]
        tl.store(input_gradient + place, round_to(back * scale, input_gradient.dtype.element_ty), mask=mask)
        if weight_sums is not None:
            weight_sum += g * normal
        if bias_sums is not None:
            bias_sum += g
        first += tl.num_programs(0) * ROWS
    if weight_sums is not None:
        tl.store(weight_sums + program.to(tl.int64) * size + at, tl.sum(weight_sum, axis=0), mask=inside)
    if bias_sums is not None:
        tl.store(bias_sums + program.to(tl.int64) * size + at, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit
def normalize_long(
    output: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    input: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row in blocks, which is read again for each sum; it is in the cache then."""
    row = tl.program_id(0)
    input += row.to(tl.int64) * size
    output += row.to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    average = 0.0
    if CENTRED:
        sums = tl.zeros([BLOCK], tl.float32)
        start = 0
        while start < size:
            sums += widen(tl.load(input + start + at, mask=at < size - start, other=0.0))
            start += BLOCK
        average = tl.div_rn(tl.sum(sums, axis=0), count)
        tl.store(mean + row, average)
    squares = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < size:
        x = widen(tl.load(input + start + at, mask=at < size - start, other=0.0))
        if CENTRED:
            x = tl.where(at < size - start, x - average, 0.0)
        squares += x * x
        start += BLOCK
    root = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), count) + eps)
    scale = tl.div_rn(tl.full([], 1.0, tl.float32), root)
    tl.store(rstd + row, scale)
    start = 0
    while start < size:
        mask = at < size - start
        y = widen(tl.load(input + start + at, mask=mask, other=0.0))
        if CENTRED:
            y = y - average
        y = y * scale
        if weight is not None:
            y = y * widen(tl.load(weight + start + at, mask=mask, other=0.0))
        if bias is not None:
            y = y + widen(tl.load(bias + start + at, mask=mask, other=0.0))
        tl.store(output + start + at, round_to(y, output.dtype.element_ty), mask=mask)

        start += BLOCK


@triton.jit
def load_normal(
    input: tl.tensor, mean: tl.tensor, scale: tl.tensor, row: tl.tensor, mask: tl.tensor, CENTRED: tl.constexpr
) -> tl.tensor:
    """What the norm made of elements before weight and bias; 0 where the mask is false."""
    x = widen(tl.load(input, mask=mask, other=0.0))
    if CENTRED:
        x = tl.where(mask, x - tl.load(mean + row), 0.0)
    return x * scale


@triton.jit
def differentiate_long(
    input_gradient: tl.tensor,
    output_gradient: tl.tensor,
    input: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of one row, in blocks."""
    row = tl.program_id(0)
    start_of_row = row.to(tl.int64) * size
    input_gradient += start_of_row
    output_gradient += start_of_row
    input += start_of_row
    at = tl.arange(0, BLOCK)
    scale = tl.load(rstd + row)
    inner_sum = tl.zeros([BLOCK], tl.float32)
    normal_sum = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < size:
        mask = at < size - start
        inner = widen(tl.load(output_gradient + start + at, mask=mask, other=0.0))
        if weight is not None:
            inner = inner * widen(tl.load(weight + start + at, mask=mask, other=0.0))
        inner_sum += inner
        normal_sum += inner * load_normal(input + start + at, mean, scale, row, mask, CENTRED)
        start += BLOCK
    first = tl.div_rn(tl.sum(inner_sum, axis=0), count)
    second = tl.div_rn(tl.sum(normal_sum, axis=0), count)
    start = 0
    while start < size:
        mask = at < size - start
        inner = widen(tl.load(output_gradient + start + at, mask=mask, other=0.0))
        if weight is not None:
            inner = inner * widen(tl.load(weight + start + at, mask=mask, other=0.0))
        back = inner - load_normal(input + start + at, mean, scale, row, mask, CENTRED) * second
        if CENTRED:
            back = back - first
        tl.store(input_gradient + start + at, round_to(back * scale, input_gradient.dtype.element_ty), mask=mask)

        start += BLOCK


@triton.jit(do_not_specialize=["tokens"])
def sum_long(
    weight_sums: tl.tensor,
    bias_sums: tl.tensor,
    output_gradient: tl.tensor,
    input: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of columns of every num_programs-th row, added up for weight and bias."""
    program = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    start = program.to(tl.int64) * size
    row = program
    while row < tokens:
        g = widen(tl.load(output_gradient + start + at, mask=mask, other=0.0))
        if weight_sums is not None:
            weight_sum += g * load_normal(input + start + at, mean, tl.load(rstd + row), row, mask, CENTRED)
        bias_sum += g
        start += tl.num_programs(0).to(tl.int64) * size
        row += tl.num_programs(0)
    place = program.to(tl.int64) * size + at
    if weight_sums is not None:
        tl.store(weight_sums + place, weight_sum, mask=mask)
    if bias_sums is not None:
        tl.store(bias_sums + place, bias_sum, mask=mask)


@triton.jit(do_not_specialize=["programs"])
def add_partials(
    result: tl.tensor,
    partials: tl.tensor,
    programs: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sum of the rows of [programs, size] for COLUMNS columns, rounded once."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = 0
    while first < programs:
        mask = (first + row < programs)[:, None] & (at < size)[None, :]
        total += tl.load(partials + (first + row).to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
        first += ROWS
    tl.store(result + at, round_to(tl.sum(total, axis=0), result.dtype.element_ty), mask=at < size)
