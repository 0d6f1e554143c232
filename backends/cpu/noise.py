"""Stochastic rounding to bf16 inside compiled kernels: the hash of `reference.noise`, in words of 32 bits.

What a word of noise does not share with its neighbours is the lower half of its index, so a stretch of indices that
have one upper half has one key.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from windlass.backends.cpu.bits import floats_at, halves_at

_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _mix(builder: Any, word: Any) -> Any:
    """The 32-bit finalizer, as instructions."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = builder.xor(word, builder.lshr(word, ir.Constant(_INT32, shift)))
        word = builder.mul(word, ir.Constant(_INT32, factor))
    return builder.xor(word, builder.lshr(word, ir.Constant(_INT32, 16)))


@intrinsic
def noise_key(_typing: Any, _seed: Any, _index: Any) -> Any:
    """`noise_key(seed, index)`: what all indices with this upper half share."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        seed, index = arguments
        upper = [b.trunc(b.lshr(one, ir.Constant(_INT64, 32)), _INT32) for one in (seed, index)]
        return _mix(b, b.xor(b.trunc(seed, _INT32), _mix(b, b.xor(upper[0], _mix(b, upper[1])))))

    return types.uint32(types.int64, types.int64), generate


@intrinsic
def round_bfloat16(_typing: Any, _value: Any, _index: Any, _key: Any) -> Any:
    """`round_bfloat16(value, index, key)`: fp32 to bfloat16 by the lower half of this index's noise."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        value, index, key = arguments
        bits = b.bitcast(value, _INT32)
        chance = b.and_(_mix(b, b.xor(b.trunc(index, _INT32), key)), ir.Constant(_INT32, 0xFFFF))
        moved = b.lshr(b.add(bits, chance), ir.Constant(_INT32, 16))
        upper = b.lshr(bits, ir.Constant(_INT32, 16))
        size = b.and_(bits, ir.Constant(_INT32, 0x7FFFFFFF))
        is_nan = b.icmp_unsigned(">", size, ir.Constant(_INT32, 0x7F800000))
        special = b.icmp_unsigned(">=", size, ir.Constant(_INT32, 0x7F800000))
        kept = b.select(is_nan, b.or_(upper, ir.Constant(_INT32, 0x40)), upper)
        return b.trunc(b.select(special, kept, moved), _INT16)

    return types.uint16(types.float32, types.int64, types.uint32), generate


@njit(types.void(*[types.int64] * 5), nogil=True, cache=True, error_model="numpy")
def round_vector(destination: int, source: int, count: int, seed: int, first: int) -> None:
    """`count` fp32 elements rounded to bfloat16 by the noise of `seed` from index `first` on."""
    floats = floats_at(source)
    output = halves_at(destination)
    begin = 0
    while begin < count:
        # No further than where the upper half of the index changes.
        end = min(count, begin + (1 << 32) - ((first + begin) & 0xFFFFFFFF))
        key = noise_key(seed, first + begin)
        for i in range(begin, end):
            output[i] = round_bfloat16(floats[i], first + i, key)
        begin = end
