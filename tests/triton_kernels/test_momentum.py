"""Muon's two passes in Triton against numpy, operation by operation, to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.reference import noise as chance
from windlass.backends.triton.momentum import BLOCK, momentum_blend, scale_decay_update
from windlass.conformance.kernel_cases import DTYPES, KEEP, ONE, SKIP, equal_bits

BLEND = torch.tensor([0.95, 0.05])
DECAY = torch.tensor([0.02, 0.1, 0.35])
SCALE = torch.tensor(0.7)
SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -3e-39, 1.2e-38, 1.0, -7.0, 1e19, -2e19, 3.4e38, math.inf, math.nan])


def normal(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blend_stepwise(momentum: Tensor, gradient: Tensor, scale: Tensor, *, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The new momentum and the direction, each operation rounded to fp32 by IEEE 754."""
    mu, rest = BLEND.numpy()
    before = momentum.float().numpy()
    with np.errstate(all="ignore"):
        g = gradient.float().numpy() * scale.numpy()
        after = before + rest * (g - before)
        direction = g + mu * (after - g) if nesterov else after
    return torch.from_numpy(after), torch.from_numpy(direction)


def decay_stepwise(weight: Tensor, direction: Tensor, scalars: Tensor = DECAY) -> Tensor:
    lr, decay, scale = scalars.numpy()
    with np.errstate(all="ignore"):
        new = weight.numpy() * (np.float32(1) - lr * decay) - (lr * scale) * direction.float().numpy()
    return torch.from_numpy(new)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("blended", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", DTYPES, ids=str)
def test_blend_is_rounded_as_the_standard_says(gradient: torch.dtype, blended: torch.dtype, nesterov: bool) -> None:
    momentum, g, found = normal(BLOCK + 77, 0), normal(BLOCK + 77, 1, gradient), torch.empty(BLOCK + 77, dtype=blended)
    after, direction = blend_stepwise(momentum, g, SCALE, nesterov=nesterov)
    results = momentum_blend(momentum, g, found, BLEND, SCALE, KEEP, nesterov=nesterov)
    assert results[0] is momentum
    assert results[1] is found
    assert equal_bits(momentum, after)
    assert equal_bits(found, direction.to(blended))


def test_blend_of_extreme_numbers() -> None:
    momentum, g = (each.flatten().clone() for each in torch.meshgrid([SPECIAL] * 2, indexing="ij"))
    found = torch.empty(momentum.numel(), dtype=torch.bfloat16)
    after, direction = blend_stepwise(momentum, g, ONE, nesterov=True)
    momentum_blend(momentum, g, found, BLEND, ONE, KEEP)
    assert equal_bits(momentum, after)
    assert equal_bits(found, direction.bfloat16())


@pytest.mark.parametrize("gradient", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 2**32 - 2100])
def test_bf16_momentum_is_rounded_by_the_noise_of_its_elements(gradient: torch.dtype, first: int) -> None:
    count, noise = 2 * BLOCK + 77, torch.tensor([2**45 + 3, first])
    momentum, g = normal(count, 0, torch.bfloat16), normal(count, 1, gradient)
    found = torch.empty(count, dtype=torch.float16)
    after, direction = blend_stepwise(momentum, g, SCALE, nesterov=True)
    momentum_blend(momentum, g, found, BLEND, SCALE, KEEP, noise)
    drawn = chance.low_half(chance.make_noise(noise, count))
    assert equal_bits(momentum, chance.round_stochastically(after, drawn))
    assert equal_bits(found, direction.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blend_that_may_not_be_kept_gives_zeros(dtype: torch.dtype) -> None:
    momentum, g = normal(BLOCK + 5, 0, dtype), normal(BLOCK + 5, 1)
    g[3], g[BLOCK + 1] = math.nan, math.inf
    before, found = momentum.clone(), torch.full((BLOCK + 5,), 7.0)
    noise = None if dtype is torch.float32 else torch.tensor([1, 2])
    momentum_blend(momentum, g, found, BLEND, torch.tensor(math.inf), SKIP, noise)
    assert equal_bits(momentum, before)
    assert equal_bits(found, torch.zeros(BLOCK + 5))


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DTYPES, ids=str)
def test_update_is_rounded_as_the_standard_says(direction: torch.dtype, low: torch.dtype | None) -> None:
    weight, along = normal(BLOCK + 77, 0), normal(BLOCK + 77, 1, direction)
    copy = None if low is None else torch.full((BLOCK + 77,), 7.0, dtype=low)
    new = decay_stepwise(weight, along)
    results = scale_decay_update(weight, along, DECAY, KEEP, copy)
    assert results[0] is weight
    assert results[1] is copy
    assert equal_bits(weight, new)
    assert copy is None or equal_bits(copy, new.to(copy.dtype))


def test_update_of_extreme_numbers() -> None:
    weight, along = (each.flatten().clone() for each in torch.meshgrid([SPECIAL] * 2, indexing="ij"))
    low = torch.empty(weight.numel(), dtype=torch.bfloat16)
    new = decay_stepwise(weight, along)
    scale_decay_update(weight, along, DECAY, KEEP, low)
    assert equal_bits(weight, new)
    assert equal_bits(low, new.bfloat16())


def test_update_that_may_not_be_kept_changes_nothing() -> None:
    weight, low = normal(BLOCK + 5, 0), torch.full((BLOCK + 5,), 7.0, dtype=torch.bfloat16)
    before = weight.clone()
    scale_decay_update(weight, torch.full((BLOCK + 5,), math.nan), DECAY * math.inf, SKIP, low)
    assert equal_bits(weight, before)
    assert (low == 7).all()


@pytest.mark.parametrize("count", [0, 1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 9])
@pytest.mark.parametrize("start", [0, 1, 4, 8])
def test_every_length_and_start(count: int, start: int) -> None:
    """What lies around a slice stays as it was."""
    part, size = slice(start, start + count), count + start + 9
    weight, along, blended = normal(size, 0), normal(size, 1, torch.bfloat16), normal(size, 2, torch.bfloat16)
    moved, momentum, found = weight.clone(), weight.clone(), blended.clone()
    scale_decay_update(moved[part], along[part], DECAY, KEEP, found[part])
    wanted, low = weight.clone(), blended.clone()
    wanted[part] = decay_stepwise(weight[part], along[part])
    low[part] = wanted[part].bfloat16()
    assert equal_bits(moved, wanted)
    assert equal_bits(found, low)
    momentum_blend(momentum[part], along[part], found[part], BLEND, SCALE, KEEP)
    wanted, low = weight.clone(), blended.clone()
    wanted[part], direction = blend_stepwise(weight[part], along[part], SCALE, nesterov=True)
    low[part] = direction.bfloat16()
    assert equal_bits(momentum, wanted)
    assert equal_bits(found, low)


def test_what_does_not_fit_is_refused() -> None:
    three, narrow, noise = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"^kernel 'momentum_blend' got gradient as contiguous float32\[4\], wanted"):
        momentum_blend(three, torch.zeros(4), three.clone(), BLEND, ONE, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'momentum_blend' got no noise for a momentum of torch.bfloat16, w"):
        momentum_blend(narrow, three, three.clone(), BLEND, ONE, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'momentum_blend' got noise for a momentum of torch.float32, wanted"):
        momentum_blend(three, three.clone(), three.clone(), BLEND, ONE, KEEP, noise)
    with pytest.raises(ValueError, match=r"^kernel 'scale_decay_update' got low as contiguous float32\[3\], wanted"):
        scale_decay_update(three, three.clone(), DECAY, KEEP, three.clone())
    with pytest.raises(ValueError, match=r"^kernel 'scale_decay_update' got scalars as contiguous float32\[2\], want"):
        scale_decay_update(three, three.clone(), BLEND, KEEP)
