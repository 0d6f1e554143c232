"""Momentum, blend and update in compiled code: the bits of the reference, and few microseconds a call."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from windlass.accelerator import reference
from windlass.backends.cpu.momentum import momentum_blend, scale_decay_update
from windlass.conformance.kernel_cases import DTYPES, KEEP, ONE, SKIP, equal_bits
from windlass.conformance.momentum_cases import blend_scalars

NOISE = torch.tensor([0x123456789ABCDE, (1 << 32) - 5000])
NUMBERS = torch.tensor([0.02, 0.1, 1.3])


def draw(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=random) * 10 ** torch.randn(count, generator=random)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("blended", DTYPES)
def test_blend_has_the_bits_of_the_reference(
    blended: torch.dtype, gradient: torch.dtype, momentum: torch.dtype, nesterov: bool
) -> None:
    noise = None if momentum is torch.float32 else NOISE
    for count, keep in itertools.product((1, 7, 10_007), (KEEP, SKIP)):
        momenta, gradients = [draw(count, 1).to(momentum) for _ in range(2)], draw(count, 2).to(gradient)
        blends = [torch.full((count,), 7.0, dtype=blended) for _ in range(2)]
        for kernel, one, blend in zip((momentum_blend, reference.momentum_blend), momenta, blends, strict=True):
            results = kernel(
                one, gradients, blend, blend_scalars(0.95), torch.tensor(0.37), keep, noise, nesterov=nesterov
            )
            assert results[0] is one
            assert results[1] is blend
        assert equal_bits(*momenta)
        assert equal_bits(*blends)


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DTYPES)
def test_update_has_the_bits_of_the_reference(direction: torch.dtype, low: torch.dtype | None) -> None:
    for count, keep in itertools.product((1, 7, 10_007), (KEEP, SKIP)):
        weights, directions = [draw(count, 3) for _ in range(2)], draw(count, 4).to(direction)
        copies = [None if low is None else torch.full((count,), 7.0, dtype=low) for _ in range(2)]
        for kernel, weight, copy in zip(
            (scale_decay_update, reference.scale_decay_update), weights, copies, strict=True
        ):
            results = kernel(weight, directions, NUMBERS, keep, copy)
            assert results[0] is weight
            assert results[1] is copy
        assert equal_bits(*weights)
        if copies[0] is not None and copies[1] is not None:
            assert equal_bits(copies[0], copies[1])


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16])
def test_blend_of_extreme_numbers(momentum: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -3e-39, 1.2e-38, 1.0, -7.0, 1e19, 3.3e38, -3.4e38, math.inf, math.nan])
    pairs = [each.flatten() for each in torch.meshgrid([values] * 2, indexing="ij")]
    momenta = [pairs[0].to(momentum).clone() for _ in range(2)]
    blends = [torch.empty_like(pairs[1]) for _ in range(2)]
    noise = None if momentum is torch.float32 else NOISE
    for kernel, one, blend in zip((momentum_blend, reference.momentum_blend), momenta, blends, strict=True):
        kernel(one, pairs[1], blend, blend_scalars(0.9), ONE, KEEP, noise)
    assert equal_bits(*(one.nan_to_num(nan=5.0) for one in momenta))
    assert torch.equal(momenta[0].isnan(), momenta[1].isnan())
    assert torch.equal(blends[0].nan_to_num(nan=5.0), blends[1].nan_to_num(nan=5.0))


def test_a_slice_gets_the_bits_of_the_whole() -> None:
    whole, gradient = draw(5000, 5).bfloat16(), draw(5000, 6)
    parts, blends = whole.clone(), [torch.empty(5000) for _ in range(2)]
    momentum_blend(whole, gradient, blends[0], blend_scalars(0.95), ONE, KEEP, NOISE)
    for begin, end in ((0, 1), (1, 1030), (1030, 1031), (1031, 5000)):
        here = slice(begin, end)
        noise = NOISE + torch.tensor([0, begin])
        momentum_blend(parts[here], gradient[here], blends[1][here], blend_scalars(0.95), ONE, KEEP, noise)
    assert equal_bits(whole, parts)
    assert equal_bits(*blends)


def test_what_does_not_fit_is_refused() -> None:
    momentum, gradient, blended = torch.zeros(3), torch.zeros(4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"^kernel 'momentum_blend' got gradient as contiguous float32\[4\] on cpu"):
        momentum_blend(momentum, gradient, blended, blend_scalars(0.9), ONE, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'momentum_blend' got momentum as contiguous float16\[3\] on cpu"):
        momentum_blend(momentum.half(), momentum, blended, blend_scalars(0.9), ONE, KEEP, NOISE)
    with pytest.raises(ValueError, match=r"^kernel 'momentum_blend' got noise as contiguous int32\[2\] on cpu"):
        momentum_blend(momentum.bfloat16(), momentum, blended, blend_scalars(0.9), ONE, KEEP, NOISE.int())
    with pytest.raises(ValueError, match="got no noise"):
        momentum_blend(momentum.bfloat16(), momentum, blended, blend_scalars(0.9), ONE, KEEP)
    with pytest.raises(
        ValueError, match=r"^kernel 'scale_decay_update' got direction as contiguous float64\[3\] on cpu"
    ):
        scale_decay_update(momentum, momentum.double(), NUMBERS, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'scale_decay_update' got low as strided bfloat16\[3\] on cpu"):
        scale_decay_update(momentum, momentum, NUMBERS, KEEP, torch.zeros(6).bfloat16()[::2])


def test_a_call_costs_little() -> None:
    """A step makes dozens of calls; each is to cost about 10 microseconds, and 50 leave room for a busy machine."""
    vector, scalars = torch.zeros(8), blend_scalars(0.9)
    calls: dict[str, Callable[[], object]] = {
        "momentum_blend": lambda: momentum_blend(vector, vector, torch.empty(8), scalars, ONE, KEEP),
        "scale_decay_update": lambda: scale_decay_update(vector, vector, NUMBERS, KEEP),
    }
    for name, call in calls.items():
        seconds = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 50e-6, f"a call of {name} costs {min(seconds) * 1e6:.0f} us"
