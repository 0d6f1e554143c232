"""Pointers and conversions to and from 16-bit floats inside compiled kernels.

numba knows neither bfloat16 nor a fast half, so kernels see 16-bit floats as `uint16` and convert with integer
instructions of fixed width, which every processor has and every compiler vectorises. They work on one
element and have no state: a result cannot depend on where in a vector it was computed.

numba's cache watches the file of a kernel and not this one: after a change here, touch the files that import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_INT16, _INT32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


def _int32(value: int) -> Any:
    return ir.Constant(_INT32, value)


def _pointer(element: Any) -> Callable[..., Any]:
    """Code that turns an address into a pointer to `element`."""
    pointer = types.CPointer(element)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    def type_it(_typing: Any, _address: Any) -> Any:
        return pointer(types.int64), generate

    return type_it


floats_at = intrinsic(_pointer(types.float32))
"""`floats_at(address)`: a pointer to fp32 elements."""

halves_at = intrinsic(_pointer(types.uint16))
"""`halves_at(address)`: a pointer to 16-bit elements."""

integers_at = intrinsic(_pointer(types.int64))
"""`integers_at(address)`: a pointer to integers of 64 bits."""

bytes_at = intrinsic(_pointer(types.uint8))
"""`bytes_at(address)`: a pointer to bytes."""


@intrinsic
def widen_bfloat16(_typing: Any, _half: Any) -> Any:
    """bfloat16 to fp32, exactly: the same number with sixteen more zeros."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _INT32), _int32(16)), _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def narrow_bfloat16(_typing: Any, _value: Any) -> Any:
    """fp32 to bfloat16, to nearest even; a nan becomes a quiet nan of the same sign."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        bits = b.bitcast(arguments[0], _INT32)
        upper = b.lshr(bits, _int32(16))
        odd = b.and_(upper, _int32(1))
        rounded = b.lshr(b.add(bits, b.add(odd, _int32(0x7FFF))), _int32(16))
        is_nan = b.fcmp_unordered("uno", arguments[0], arguments[0])
        return b.trunc(b.select(is_nan, b.or_(upper, _int32(0x40)), rounded), _INT16)

    return types.uint16(types.float32), generate


@intrinsic
def widen_float16(_typing: Any, _half: Any) -> Any:
    """float16 to fp32, exactly, subnormals too."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        half = b.zext(arguments[0], _INT32)
        size = b.and_(half, _int32(0x7FFF))
        sign = b.shl(b.and_(half, _int32(0x8000)), _int32(16))
        # The exponent's bias is 15 here and 127 there; infinity and nan have the largest exponent in both.
        special = b.icmp_unsigned(">=", size, _int32(0x7C00))
        bias = b.select(special, _int32(224 << 23), _int32(112 << 23))
        normal = b.add(b.shl(size, _int32(13)), bias)
        # Subnormals are multiples of 2^-24. They go through an integer, so that no fp32 subnormal is formed,
        # which a processor told to flush subnormals would take for zero.
        multiple = b.fmul(b.sitofp(size, _FLOAT), ir.Constant(_FLOAT, 2.0**-24))
        subnormal = b.icmp_unsigned("<", size, _int32(0x0400))
        return b.bitcast(b.or_(sign, b.select(subnormal, b.bitcast(multiple, _INT32), normal)), _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def narrow_float16(_typing: Any, _value: Any) -> Any:
    """fp32 to float16, to nearest even; what is too large becomes infinity, a nan becomes a quiet nan."""

    def generate(_context: Any, b: Any, _signature: Any, arguments: Any) -> Any:
        bits = b.bitcast(arguments[0], _INT32)
        size = b.and_(bits, _int32(0x7FFFFFFF))
        sign = b.and_(b.lshr(bits, _int32(16)), _int32(0x8000))
        shifted = b.sub(size, _int32(112 << 23))  # the other bias
        odd = b.and_(b.lshr(shifted, _int32(13)), _int32(1))
        half = b.lshr(b.add(shifted, b.add(odd, _int32(0x0FFF))), _int32(13))
        # Below 2^-14 the result is a multiple of 2^-24, the spacing of fp32 at one half: the addition rounds.
        sum_bits = b.bitcast(b.fadd(b.bitcast(size, _FLOAT), ir.Constant(_FLOAT, 0.5)), _INT32)
        multiple = b.sub(sum_bits, _int32(0x3F000000))
        half = b.select(b.icmp_unsigned("<", size, _int32(113 << 23)), multiple, half)
        half = b.select(b.icmp_unsigned(">=", size, _int32(143 << 23)), _int32(0x7C00), half)
        half = b.select(b.icmp_unsigned(">", size, _int32(0x7F800000)), _int32(0x7E00), half)
        return b.trunc(b.or_(sign, half), _INT16)

    return types.uint16(types.float32), generate
