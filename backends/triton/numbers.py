"""Rounding and chance inside kernels, to the same bits on a device and in Triton's interpreter.

bf16 is the upper half of fp32, so that both directions are arithmetic on integers: the interpreter's own conversion
cuts off where hardware rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(values: tl.tensor) -> tl.tensor:
    """fp32 of fp32, bf16 or fp16, exactly."""
    if values.dtype == tl.bfloat16:
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def round_to(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 to fp32, bf16 or fp16, to nearest even; a nan stays one."""
    if dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # A nan whose payload lies in the lower half would round to inf.
        rounded = tl.where(values != values, 0x7FFF, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def round_stochastically(values: tl.tensor, chance: tl.tensor) -> tl.tensor:
    """fp32 to bf16 as `reference.noise.round_stochastically`; `chance` is of uint32, below 2^16."""
    bits = values.to(tl.uint32, bitcast=True)
    moved = ((bits + chance) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, round_to(values, tl.bfloat16), moved)


@triton.jit
def make_noise(seed: tl.tensor, first: tl.tensor, offsets: tl.tensor) -> tl.tensor:
    """32 bits of chance, uint32, for elements `first + offsets`, as `reference.noise.make_noise`.

    `seed` and `first` are scalars of int64, `offsets` a vector of int32 that are not negative. The upper half of an
    index is that of `first` or one more, so that its two rounds of mixing are of scalars.
    """
    low = first.to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    here = _key(seed, high)
    beyond = _key(seed, high + 1)
    index = low + offsets.to(tl.uint32)
    return _mix(index ^ tl.where(index < low, beyond, here))


@triton.jit
def _key(seed: tl.tensor, high: tl.tensor) -> tl.tensor:
    return _mix(seed.to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32) ^ _mix(high)))


@triton.jit
def _mix(word: tl.tensor) -> tl.tensor:
    """A bijection of 32-bit words; products wrap."""
    word = tl.mul(word ^ (word >> 16), 0x7FEB352D, sanitize_overflow=False)
    word = tl.mul(word ^ (word >> 15), 0x846CA68B, sanitize_overflow=False)
    return word ^ (word >> 16)
