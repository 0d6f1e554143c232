"""Stochastic rounding to bf16: to one of the two neighbours, with a chance that makes the mean right.

The bits of chance are a hash of a seed and of the element's index, so that every backend, slicing and number of ranks
rounds an element in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_HALF = 0xFFFF


def make_noise(noise: Tensor, count: int) -> Tensor:
    """[count] int64 in [0, 2^32) for the elements from `noise[1]` on under seed `noise[0]`, both int64 below 2^63.

    Two rounds of the 32-bit finalizer of Wellons 2018 ("Prospecting for hash functions"), first over the seed and the
    upper half of the index, then over the lower half.
    """
    index = noise[1] + torch.arange(count, dtype=torch.int64, device=noise.device)
    key = _mix((noise[0] & _WORD) ^ _mix((noise[0] >> 32) ^ _mix(index >> 32)))
    return _mix((index & _WORD) ^ key)


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words; products wrap, whatever int64 makes of their upper half."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def round_stochastically(values: Tensor, chance: Tensor) -> Tensor:
    """fp32 to bf16: `chance`, 16 bits each, is added below the last bit that stays, and the rest is cut off.

    What bf16 holds stays as it is; inf and nan do too.
    """
    bits = values.view(torch.int32).to(torch.int64) & _WORD
    moved = (bits + chance) & (_WORD ^ _HALF)
    signed = torch.where(moved > 0x7FFFFFFF, moved - (1 << 32), moved).to(torch.int32)
    rounded = signed.view(torch.float32).to(torch.bfloat16)
    return torch.where(torch.isfinite(values), rounded, values.to(torch.bfloat16))


def low_half(noise: Tensor) -> Tensor:
    """The lower 16 bits, for the first value of an element."""
    return noise & _HALF


def high_half(noise: Tensor) -> Tensor:
    """The upper 16 bits, for the second value of an element."""
    return noise >> 16
