"""Stochastic rounding to bf16 once more, in NumPy's words of 32 bits, written without the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from windlass.conformance.kernel_cases import Doubles

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Noise:
    """What decides the rounding of elements `first`, `first` + 1, and so on."""

    seed: int
    first: int = 0

    def tensor(self) -> Tensor:
        """The argument of a kernel, on the host."""
        return torch.tensor([self.seed, self.first], dtype=torch.int64)

    def at(self, offset: int) -> Noise:
        """For the slice that begins `offset` elements later."""
        return Noise(self.seed, self.first + offset)

    def words(self, count: int) -> Words:
        """One for each element."""
        index = np.arange(count, dtype=np.uint64) + np.uint64(self.first)
        seed = np.array([self.seed], dtype=np.uint64)
        key = _finalize(_upper(index))
        key = _finalize(_upper(seed) ^ key)
        key = _finalize(_lower(seed) ^ key)
        return _finalize(_lower(index) ^ key)

    def chances(self, count: int) -> tuple[Words, Words]:
        """For the first and the second value of each element: its lower and its upper 16 bits."""
        words = self.words(count)
        return words & np.uint32(0xFFFF), words >> np.uint32(16)


SEEDS = (0, 1, 0x9E3779B97F4A7C15 >> 1, (1 << 63) - 1)
"""None, few, many and all bits."""
CROSSING = Noise(seed=77, first=(1 << 32) - 1030)
"""Its indices pass 2^32 after 1030 elements."""


def _finalize(words: Words) -> Words:
    """The 32-bit finalizer "lowbias32" of Wellons 2018, "Prospecting for hash functions"."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = words ^ (words >> np.uint32(shift))
        words = words * np.uint32(factor)
    return words ^ (words >> np.uint32(16))


def _upper(words: npt.NDArray[np.uint64]) -> Words:
    return (words >> np.uint64(32)).astype(np.uint32)


def _lower(words: npt.NDArray[np.uint64]) -> Words:
    return (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def round_with(values: Tensor, chances: Words) -> Tensor:
    """fp32 to bf16, away from zero where what does not fit, in units of the last place that does, and the chance, in
    units of 2^-16, come to 1; inf and nan as they are."""
    bits = values.numpy().view(np.uint32)
    upper, rest = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
    rounded = (upper + (rest + chances >= 1 << 16)).astype(np.uint16)
    narrow = torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)
    return torch.where(values.isfinite(), narrow, values.to(torch.bfloat16))


def count_outside(found: Tensor, wanted: Doubles, allowed: Doubles, chances: Words) -> int:
    """Elements of bf16 that are no rounding, with these chances, of any number within `allowed` of the wanted one.

    Rounding with a given chance never turns the order of two numbers around, so the ends of the interval decide.
    """
    low, high = (round_with(torch.from_numpy(end), chances).double() for end in enclose(wanted, allowed))
    value = found.double()
    return int((~((low <= value) & (value <= high))).sum())


def enclose(wanted: Doubles, allowed: Doubles) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The numbers of fp32 that enclose an interval."""
    low, high = (wanted - allowed).astype(np.float32), (wanted + allowed).astype(np.float32)
    infinity = np.float32(np.inf)
    low = np.where(low > wanted - allowed, np.nextafter(low, -infinity), low)
    high = np.where(high < wanted + allowed, np.nextafter(high, infinity), high)
    return low.astype(np.float32), high.astype(np.float32)


def draw_values(count: int, seed: int = 3) -> Tensor:
    """Numbers of both signs with any last 16 bits, none of them small enough to vanish anywhere."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(0x20, 0xD0, (count,), generator=generator, dtype=torch.int32)
    rest = torch.randint(0, 1 << 23, (count,), generator=generator, dtype=torch.int32)
    sign = torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1
    return ((exponent << 23) | rest).view(torch.float32) * sign


def draw_exact_roots(count: int, seed: int = 4) -> Tensor:
    """Numbers of twelve significant bits: their squares are numbers of fp32, with bits to round away."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(1 << 11, 1 << 12, (count,), generator=generator).float()
    sign = torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1
    return whole * 2.0**-10 * sign
