"""Rounding and chance inside kernels, on every pattern of bits that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.reference import noise as reference
from windlass.backends.triton.numbers import make_noise, round_stochastically, round_to, widen
from windlass.conformance.kernel_cases import equal_bits, every_pattern, values_around

BLOCK = 4096


@triton.jit
def _widen(output: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(output + at, widen(tl.load(values + at)))


@triton.jit
def _round(output: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(output + at, round_to(tl.load(values + at), output.dtype.element_ty))


@triton.jit
def _noise(output: tl.tensor, noise: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(noise + 1) + tl.program_id(0) * BLOCK
    tl.store(output + at, make_noise(tl.load(noise), first, tl.arange(0, BLOCK)).to(tl.int64))


@triton.jit
def _stochastically(output: tl.tensor, values: tl.tensor, chance: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(output + at, round_stochastically(tl.load(values + at), tl.load(chance + at).to(tl.uint32)))


def padded(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(-values.numel() % BLOCK)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    values = every_pattern().view(dtype)
    found = torch.empty(values.numel())
    _widen[(values.numel() // BLOCK,)](found, values, BLOCK=BLOCK)
    assert equal_bits(found, values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_goes_to_the_nearest_even(dtype: torch.dtype) -> None:
    values = padded(values_around(dtype))
    payload = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    values[-5:] = payload  # nans of every kind, and the largest number
    found = torch.empty(values.numel(), dtype=dtype)
    _round[(values.numel() // BLOCK,)](found, values, BLOCK=BLOCK)
    assert equal_bits(found, values.to(dtype))
    assert bool(found[-5:-1].isnan().all())


@pytest.mark.parametrize("first", [0, 12_345, 2**32 - 5000, 2**32 - BLOCK, 2**33 + 7, 2**62])
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 17, 2**63 - 1])
def test_noise_is_that_of_the_reference(seed: int, first: int) -> None:
    noise = torch.tensor([seed, first])
    found = torch.empty(2 * BLOCK, dtype=torch.int64)
    _noise[(2,)](found, noise, BLOCK=BLOCK)
    assert torch.equal(found, reference.make_noise(noise, 2 * BLOCK))


def test_stochastic_rounding_has_the_bits_of_the_reference() -> None:
    values = padded(values_around(torch.bfloat16))
    chance = torch.from_numpy(np.random.default_rng(1).integers(0, 2**16, values.numel()))
    found = torch.empty(values.numel(), dtype=torch.bfloat16)
    _stochastically[(values.numel() // BLOCK,)](found, values, chance, BLOCK=BLOCK)
    assert equal_bits(found, reference.round_stochastically(values, chance))


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """Every chance once: the mean of what comes out is the number that went in, exactly."""
    chance = torch.arange(2**16)
    for value in (1.0 + 2**-9, -3.14159, 1e-30, 1.5e38):
        values = torch.full((2**16,), value)
        found = torch.empty(2**16, dtype=torch.bfloat16)
        _stochastically[(2**16 // BLOCK,)](found, values, chance, BLOCK=BLOCK)
        assert found.double().mean().item() == values[0].double().item()
