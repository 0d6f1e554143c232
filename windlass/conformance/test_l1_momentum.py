"""Level 1: momentum_blend and scale_decay_update: what Muon does to a vector before and after its products."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import REFERENCE
from windlass.conformance.allocations import assert_holds, assert_same_bits, bring, dtype_named
from windlass.conformance.kernel_cases import KEEP, SKIP, count_different, values_around
from windlass.conformance.kernel_runs import (
    SLICED,
    SLICES,
    KernelFunction,
    each_implementation,
    keeps_subnormal_numbers,
)
from windlass.conformance.momentum_cases import (
    Blend,
    blend_on,
    bound_blend,
    bound_update,
    count_beyond,
    make_blend,
    run_blend,
)
from windlass.conformance.noise_cases import CROSSING, Noise, count_outside, draw_values, round_with
from windlass.conformance.requirements import requires

BLEND, UPDATE = "momentum_blend", "scale_decay_update"
MOMENTUM = pytest.mark.parametrize("momentum", ["float32", "bfloat16"])
NARROW = pytest.mark.parametrize("narrow", ["float32", "bfloat16", "float16"])
NESTEROV = pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
SCALE = torch.tensor(0.37)
RATE, DECAY, FACTOR = 0.02, 0.1, 0.2 * 32**0.5
NUMBERS = torch.tensor([RATE, DECAY, FACTOR])


def needs_both(momentum: str, narrow: str) -> tuple[str, ...]:
    return tuple({f"dtypes:{momentum}", f"dtypes:{narrow}"})


def noise_for(momentum: str) -> Noise | None:
    return CROSSING if momentum == "bfloat16" else None


def vanishing(accelerator: Accelerator) -> float:
    return 0.0 if keeps_subnormal_numbers(accelerator) else 2.0**-126


def is_exact(accelerator: Accelerator, implementation: str) -> bool:
    """Whether slices must have the bits of the whole: the compiler of a lazy device rounds what a reference multiplies
    or not, as it sees fit."""
    return implementation != REFERENCE or not accelerator.capabilities.lazy


def check_blend(
    accelerator: Accelerator, found: Blend, before: Blend, noise: Noise | None, *, nesterov: bool, what: str
) -> None:
    """A blend with mu 0.95 and `SCALE` is within its bounds."""
    bounds = bound_blend(before, 0.95, SCALE, nesterov=nesterov, vanishing=vanishing(accelerator))
    for name, interval in zip(("momentum", "blended"), bounds, strict=True):
        one: Tensor = getattr(found, name)
        if name == "momentum" and noise is not None:
            wrong = count_outside(one, *interval, noise.chances(one.numel())[0])
        else:
            wrong = count_beyond(one, interval)
        assert wrong == 0, f"{what}: {wrong} elements of {name} are beyond their bounds"


@requires(
    level=1,
    must="momentum_blend is within 4 ulp of the largest term of each sum, rounds a momentum of bf16 as its noise says, "
    "and blends from the momentum before that.",
    needs=needs_both,
    since="1.1",
)
@NESTEROV
@NARROW
@MOMENTUM
def test_blend(accelerator: Accelerator, momentum: str, narrow: str, nesterov: bool) -> None:
    gradient, blended = dtype_named(narrow), dtype_named(narrow)
    vectors, noise = make_blend(5003, dtype_named(momentum), gradient, blended), noise_for(momentum)
    with each_implementation(accelerator, BLEND) as turns:
        for implementation, kernel in turns:
            found = run_blend(accelerator, kernel, vectors, 0.95, SCALE, KEEP, noise, nesterov=nesterov)
            check_blend(accelerator, found, vectors, noise, nesterov=nesterov, what=implementation)


@requires(
    level=1,
    must="What momentum_blend gives is rounded once, to nearest even, wherever it lies between two values.",
    needs=lambda narrow: f"dtypes:{narrow}",
    since="1.1",
)
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_rounding_of_blend(accelerator: Accelerator, narrow: str) -> None:
    """Without memory the blend is the gradient. Numbers that a device may take for zero are left out."""
    around = values_around(dtype_named(narrow))[::5]
    gradient = around[around.isfinite() & (around.abs() >= 2.0**-126)]
    vectors = Blend(torch.zeros_like(gradient), gradient, torch.full_like(gradient, 7.0, dtype=dtype_named(narrow)))
    with each_implementation(accelerator, BLEND) as turns:
        for implementation, kernel in turns:
            for nesterov in (True, False):
                found = run_blend(accelerator, kernel, vectors, 0.0, nesterov=nesterov)
                assert_same_bits(found.blended, gradient.to(dtype_named(narrow)), f"blended of {implementation}")
                assert_same_bits(found.momentum, gradient, f"momentum of {implementation}")


@requires(
    level=1,
    must="The bits of chance of momentum_blend are the lower halves of the hash of seed and index.",
    needs="dtypes:bfloat16",
    since="1.1",
)
def test_noise(accelerator: Accelerator) -> None:
    gradient = draw_values(2060)
    vectors = Blend(torch.zeros(2060, dtype=torch.bfloat16), gradient, torch.zeros(2060))
    with each_implementation(accelerator, BLEND) as turns:
        for implementation, kernel in turns:
            for noise in (CROSSING, Noise(1 << 40, 3)):
                found = run_blend(accelerator, kernel, vectors, 0.0, noise=noise)
                wanted = round_with(gradient, noise.chances(2060)[0])
                assert_same_bits(found.momentum, wanted, f"momentum of {implementation} under {noise}")
                assert_same_bits(found.blended, gradient, f"blended of {implementation}")


@requires(
    level=1,
    must="momentum_blend refuses a momentum of bf16 without noise, and noise for a momentum of fp32, by ValueError.",
    needs="dtypes:bfloat16",
    since="1.1",
)
@MOMENTUM
def test_noise_goes_with_bf16(accelerator: Accelerator, momentum: str) -> None:
    vectors = make_blend(64, dtype_named(momentum))
    wrong = None if momentum == "bfloat16" else Noise(1)
    with each_implementation(accelerator, BLEND) as turns:
        for _, kernel in turns:
            with pytest.raises(ValueError, match="noise"):
                run_blend(accelerator, kernel, vectors, 0.95, noise=wrong)


@requires(
    level=1,
    must="momentum_blend that may not keep its results leaves the momentum as it was and gives zeros.",
    needs=needs_both,
    since="1.1",
)
@NARROW
@MOMENTUM
def test_skipped_blend(accelerator: Accelerator, momentum: str, narrow: str) -> None:
    vectors = make_blend(1501, dtype_named(momentum), blended=dtype_named(narrow))
    broken = make_blend(1501, dtype_named(momentum), blended=dtype_named(narrow))
    broken.gradient[3], broken.gradient[700], broken.gradient[1500] = math.nan, math.inf, -math.inf
    with each_implementation(accelerator, BLEND) as turns:
        for implementation, kernel in turns:
            for before, scale in itertools.product((vectors, broken), (SCALE, torch.tensor(math.nan))):
                found = run_blend(accelerator, kernel, before, 0.95, scale, SKIP, noise_for(momentum))
                assert_same_bits(found.momentum, before.momentum, f"momentum of {implementation}, skipped,")
                assert_same_bits(found.blended, torch.zeros_like(before.blended), f"blended of {implementation}")


@requires(
    level=1,
    must="A slice gets the bits from momentum_blend that it gets within the whole, and nothing around it is written.",
    needs=lambda momentum: f"dtypes:{momentum}",
    since="1.1",
)
@MOMENTUM
def test_slices_of_blend(accelerator: Accelerator, momentum: str) -> None:
    vectors, noise = make_blend(SLICED, dtype_named(momentum)), noise_for(momentum)
    with each_implementation(accelerator, BLEND) as turns:
        for implementation, kernel in turns:
            whole = run_blend(accelerator, kernel, vectors, 0.95, SCALE, KEEP, noise)
            for begin, end in SLICES:
                there = vectors.on(accelerator)
                part, at = there.slice(begin, end), None if noise is None else noise.at(begin)
                blend_on(accelerator, kernel, part, 0.95, SCALE, KEEP, at)
                found, wanted = part.fetch(accelerator), whole.slice(begin, end)
                what = f"{implementation} at [{begin}:{end}]"
                if is_exact(accelerator, implementation):
                    assert_same_bits(found.momentum, wanted.momentum, f"momentum of {what}")
                    assert_same_bits(found.blended, wanted.blended, f"blended of {what}")
                else:
                    check_blend(accelerator, found, vectors.slice(begin, end), at, nesterov=True, what=what)
                for rest in (slice(0, begin), slice(end, SLICED)):
                    for name in ("momentum", "blended"):
                        one, before = getattr(there, name), getattr(vectors, name)
                        assert_holds(accelerator, one[rest], before[rest], f"{name} outside, {what}")


def run_update(
    accelerator: Accelerator,
    kernel: KernelFunction,
    weight: Tensor,
    direction: Tensor,
    low: torch.dtype | None,
    numbers: Tensor = NUMBERS,
    keep: Tensor = KEEP,
) -> tuple[Tensor, Tensor | None]:
    """Weight and low copy after scale_decay_update, back on the host. What is not consumed must be as it was."""
    scalars, there = bring(accelerator, numbers), bring(accelerator, direction)
    copy = None if low is None else bring(accelerator, torch.full(weight.shape, 7.0, dtype=low))
    new, new_low = kernel(bring(accelerator, weight), there, scalars, bring(accelerator, keep), copy)
    assert_holds(accelerator, scalars, numbers, "scalars, which scale_decay_update does not consume,")
    assert_holds(accelerator, there, direction, "the direction, which scale_decay_update does not consume,")
    assert (new_low is None) == (low is None)
    return accelerator.to_host(new), None if new_low is None else accelerator.to_host(new_low)


def draw_update(count: int, direction: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(13)
    weight, other = (torch.randn(count, generator=random) for _ in range(2))
    return 0.1 * weight, (0.03 * other).to(direction)


@requires(
    level=1,
    must="scale_decay_update is within 4 ulp of the largest term of its sum, and writes a low copy of exactly the new "
    "weight.",
    needs=lambda narrow, low: tuple({f"dtypes:{narrow}", *([] if low == "none" else [f"dtypes:{low}"])}),
    since="1.1",
)
@pytest.mark.parametrize("low", ["none", "bfloat16", "float16"])
@NARROW
def test_update(accelerator: Accelerator, narrow: str, low: str) -> None:
    dtype = None if low == "none" else dtype_named(low)
    with each_implementation(accelerator, UPDATE) as turns:
        for implementation, kernel in turns:
            for count in (0, 1, 5003):
                weight, direction = draw_update(count, dtype_named(narrow))
                found, copy = run_update(accelerator, kernel, weight, direction, dtype)
                interval = bound_update(weight, direction, NUMBERS, vanishing=vanishing(accelerator))
                wrong = count_beyond(found, interval)
                assert wrong == 0, f"{implementation}: {wrong} of {count} weights are beyond their bounds"
                if copy is not None:
                    assert count_different(copy, found.to(copy.dtype)) == 0, f"{implementation}: low copy"


@requires(
    level=1,
    must="scale_decay_update that may not keep its results leaves the weight and its low copy as they were.",
    needs="dtypes:bfloat16",
    since="1.1",
)
def test_skipped_update(accelerator: Accelerator) -> None:
    weight, direction = draw_update(1501, torch.float32)
    direction[5] = math.nan
    with each_implementation(accelerator, UPDATE) as turns:
        for implementation, kernel in turns:
            for numbers in (NUMBERS, torch.full((3,), math.nan)):
                found, low = run_update(accelerator, kernel, weight, direction, torch.bfloat16, numbers, SKIP)
                assert_same_bits(found, weight, f"the weight of {implementation}, skipped,")
                assert low is not None
                assert_same_bits(low, torch.full_like(low, 7.0), f"the low copy of {implementation}, skipped,")


@requires(
    level=1,
    must="A slice gets the bits from scale_decay_update that it gets within the whole, and nothing around it is "
    "written.",
    since="1.1",
)
def test_slices_of_update(accelerator: Accelerator) -> None:
    weight, direction = draw_update(SLICED, torch.float32)
    bounds = bound_update(weight, direction, NUMBERS, vanishing=vanishing(accelerator))
    with each_implementation(accelerator, UPDATE) as turns:
        for implementation, kernel in turns:
            whole, _ = run_update(accelerator, kernel, weight, direction, None)
            for begin, end in SLICES:
                there, part = bring(accelerator, weight), slice(begin, end)
                given = (bring(accelerator, each) for each in (NUMBERS, KEEP))
                result, _ = kernel(there[part], bring(accelerator, direction)[part], *given, None)
                found, what = accelerator.to_host(result), f"{implementation} at [{begin}:{end}]"
                if is_exact(accelerator, implementation):
                    assert_same_bits(found, whole[part], f"the weight of {what}")
                else:
                    assert count_beyond(found, (bounds[0][part], bounds[1][part])) == 0, what
                for rest in (slice(0, begin), slice(end, SLICED)):
                    assert_holds(accelerator, there[rest], weight[rest], f"the weight outside, {what}")
