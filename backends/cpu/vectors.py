"""What compiled kernels share: addresses of vectors that were looked at, and conversions between their dtypes."""

from __future__ import annotations

from typing import Final

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

BLOCK: Final = 1024  # elements: 4 KiB of fp32 at a time for conversions, 8 * 8 * 16 for square_sum

KIND_NONE, KIND_FLOAT, KIND_BFLOAT16, KIND_FLOAT16 = 0, 1, 2, 3
KINDS: Final = {torch.float32: KIND_FLOAT, torch.bfloat16: KIND_BFLOAT16, torch.float16: KIND_FLOAT16}
FLOAT: Final = (torch.float32,)
NARROW: Final = (torch.bfloat16, torch.float16)
ANY: Final = (torch.float32, torch.bfloat16, torch.float16)
WIDE_OR_BFLOAT16: Final = (torch.float32, torch.bfloat16)
BOOL: Final = (torch.bool,)
LONG: Final = (torch.int64,)
ADDRESS: Final = types.int64


@njit(types.void(ADDRESS, ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def widen_vector(destination: int, source: int, count: int, kind: int) -> None:
    """fp32 copies of `count` elements of any kind."""
    output = floats_at(destination)
    if kind == KIND_FLOAT:
        floats = floats_at(source)
        for i in range(count):
            output[i] = floats[i]
    elif kind == KIND_BFLOAT16:
        halves = halves_at(source)
        for i in range(count):
            output[i] = widen_bfloat16(halves[i])
    else:
        halves = halves_at(source)
        for i in range(count):
            output[i] = widen_float16(halves[i])


@njit(types.void(ADDRESS, ADDRESS, types.int64, types.int64), nogil=True, cache=True, error_model="numpy")
def narrow_vector(destination: int, source: int, count: int, kind: int) -> None:
    """`count` fp32 elements rounded to 16 bits."""
    floats = floats_at(source)
    output = halves_at(destination)
    if kind == KIND_BFLOAT16:
        for i in range(count):
            output[i] = narrow_bfloat16(floats[i])
    else:
        for i in range(count):
            output[i] = narrow_float16(floats[i])


def address_of(kernel: str, argument: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], count: int) -> int:
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
