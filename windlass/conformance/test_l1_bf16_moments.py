"""Level 1: adamw_bf16_moments: the update of adamw, and moments that are rounded by chance, but always by the same."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import REFERENCE
from windlass.conformance.allocations import assert_holds, assert_same_bits, bring, dtype_named
from windlass.conformance.kernel_cases import (
    KEEP,
    ONE,
    SKIP,
    AdamwState,
    bound_adamw,
    count_different,
    make_scalars,
    make_state,
)
from windlass.conformance.kernel_runs import (
    SLICED,
    SLICES,
    KernelFunction,
    assert_same_state,
    each_implementation,
    keeps_subnormal_numbers,
)
from windlass.conformance.noise_cases import (
    CROSSING,
    SEEDS,
    Noise,
    count_outside,
    draw_exact_roots,
    draw_values,
    round_with,
)
from windlass.conformance.requirements import requires

KERNEL = "adamw_bf16_moments"
BFLOAT16 = "dtypes:bfloat16"
GRADIENT = pytest.mark.parametrize("gradient", ["float32", "bfloat16", "float16"])
DECOUPLED = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
SCALE = torch.tensor(0.37)
NO_MEMORY: dict[str, Any] = {"lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0}
"""Then the moments are the gradient and its square, and the weight stays."""


def needs_gradient(gradient: str) -> tuple[str, ...]:
    return tuple({BFLOAT16, f"dtypes:{gradient}"})


def narrow_state(count: int, gradient: torch.dtype = torch.float32, seed: int = 0) -> AdamwState:
    """A state in the middle of a training, its moments in 16 bits."""
    state = make_state(count, gradient, torch.bfloat16, seed)
    state.exp_avg, state.exp_avg_sq = state.exp_avg.bfloat16(), state.exp_avg_sq.bfloat16()
    return state


def fresh_state(gradient: Tensor) -> AdamwState:
    """A state before its first step."""
    zeros = torch.zeros_like(gradient)
    return AdamwState(zeros.clone(), gradient, zeros.bfloat16(), zeros.bfloat16(), None)


def run(
    accelerator: Accelerator,
    kernel: KernelFunction,
    state: AdamwState,
    noise: Noise,
    scalars: Tensor,
    scale: Tensor = ONE,
    keep: Tensor = KEEP,
    *,
    decoupled: bool = True,
) -> AdamwState:
    """The state after one update on the device, back on the host. What is not consumed must be as it was."""
    given = {"scalars": scalars, "scale": scale, "keep": keep, "noise": noise.tensor()}
    there = {name: bring(accelerator, host) for name, host in given.items()}
    on_device = state.on(accelerator.device)
    (on_device.weight, on_device.exp_avg, on_device.exp_avg_sq, on_device.low) = kernel(
        on_device.weight, on_device.gradient, on_device.exp_avg, on_device.exp_avg_sq,
        there["scalars"], there["scale"], there["keep"], on_device.low, there["noise"], decoupled=decoupled,
    )  # fmt: skip
    for name, host in {**given, "gradient": state.gradient}.items():
        tensor = on_device.gradient if name == "gradient" else there[name]
        assert_holds(accelerator, tensor, host, f"{name}, which {KERNEL} does not consume,")
    found = on_device.fetch(accelerator.to_host)
    assert found.exp_avg.dtype == found.exp_avg_sq.dtype == torch.bfloat16
    return found


def check_bounds(
    accelerator: Accelerator,
    found: AdamwState,
    before: AdamwState,
    noise: Noise,
    scalars: Tensor,
    *,
    decoupled: bool = True,
    what: str,
) -> None:
    """An update with `SCALE` is within the bounds of adamw, and rounded by this noise from there."""
    vanishing = 0.0 if keeps_subnormal_numbers(accelerator) else 2.0**-126
    bounds = bound_adamw(before, scalars, SCALE, decoupled=decoupled, vanishing=vanishing)
    wanted, allowed = bounds.weight
    worst = float(np.max(np.abs(found.weight.double().numpy() - wanted) / allowed, initial=0.0))
    assert worst <= 1, f"{what}: the weight is off by {worst:.3g} of what is allowed"
    assert found.low is not None
    assert count_different(found.low, found.weight.bfloat16()) == 0, f"{what}: low copy"
    for name, chances in zip(("exp_avg", "exp_avg_sq"), noise.chances(found.weight.numel()), strict=True):
        wanted, allowed = getattr(bounds, name)
        wrong = count_outside(getattr(found, name), wanted, allowed, chances)
        assert wrong == 0, f"{what}: {wrong} elements of {name} are rounded in another way"


@requires(
    level=1,
    must="adamw_bf16_moments updates the weight within the bounds of adamw, and rounds each new moment as its noise "
    "says.",
    needs=needs_gradient,
    since="1.1",
)
@DECOUPLED
@GRADIENT
def test_bounds(accelerator: Accelerator, gradient: str, decoupled: bool) -> None:
    state = narrow_state(5003, dtype_named(gradient))
    scalars, noise = make_scalars(7, weight_decay=0.1), Noise(seed=12, first=64)
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            found = run(accelerator, kernel, state, noise, scalars, SCALE, decoupled=decoupled)
            check_bounds(accelerator, found, state, noise, scalars, decoupled=decoupled, what=implementation)


@requires(
    level=1,
    must="The bits of chance are the hash of seed and index that the schema of adamw_bf16_moments says, for any seed "
    "and any index below 2^63.",
    needs=BFLOAT16,
    since="1.1",
)
@pytest.mark.parametrize("noise", [*map(Noise, SEEDS), CROSSING], ids=["none", "one", "many", "all", "crossing"])
def test_noise(accelerator: Accelerator, noise: Noise) -> None:
    """With moments that are the gradient and its square, no arithmetic is in the way."""
    values, roots = draw_values(2060), draw_exact_roots(2060)
    first, second = noise.chances(2060)
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            found = run(accelerator, kernel, fresh_state(values), noise, make_scalars(1, **NO_MEMORY))
            what = f"exp_avg of {implementation} under {noise}"
            assert_same_bits(found.exp_avg, round_with(values, first), what)
            found = run(accelerator, kernel, fresh_state(roots), noise, make_scalars(1, **NO_MEMORY))
            assert_same_bits(found.exp_avg, round_with(roots, first), what)
            what = f"exp_avg_sq of {implementation} under {noise}"
            assert_same_bits(found.exp_avg_sq, round_with(roots * roots, second), what)


@requires(
    level=1,
    must="Stochastic rounding is right in the mean, over elements and over seeds, and leaves alone what bf16 holds.",
    needs=BFLOAT16,
    since="1.1",
)
@pytest.mark.parametrize("share", [0.0, 1 / 16, 0.5, 0.9])
def test_mean(accelerator: Accelerator, share: float) -> None:
    """So many of the numbers that lie this far between two of bf16 are rounded up, within five standard deviations."""
    count, seeds = 4096, range(5)
    value = torch.full((count,), -(1 + share * 2.0**-7))
    slack = 5 * math.sqrt(share * (1 - share) / (count * len(seeds)))
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            up = 0
            for seed in seeds:
                found = run(accelerator, kernel, fresh_state(value), Noise(seed), make_scalars(1, **NO_MEMORY))
                up += int((found.exp_avg < -1).sum())
            measured = up / (count * len(seeds))
            assert abs(measured - share) <= slack, f"{implementation}: {measured} were rounded up, not {share}"


@requires(
    level=1,
    must="A slice whose noise begins at its first index gets the bits from adamw_bf16_moments that it gets within the "
    "whole, and nothing around it is written.",
    needs=BFLOAT16,
    since="1.1",
)
def test_slices(accelerator: Accelerator) -> None:
    state, scalars, noise = narrow_state(SLICED), make_scalars(3), CROSSING
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            # The compiler of a lazy device may round a product of the reference or not, as a vector's length suggests.
            exact = implementation != REFERENCE or not accelerator.capabilities.lazy
            wanted = run(accelerator, kernel, state, noise, scalars, SCALE)
            for begin, end in SLICES:
                whole = state.on(accelerator.device)
                part = whole.slice(begin, end)
                arguments = (bring(accelerator, each) for each in (scalars, SCALE, KEEP))
                results = kernel(
                    part.weight, part.gradient, part.exp_avg, part.exp_avg_sq, *arguments, part.low,
                    bring(accelerator, noise.at(begin).tensor()),
                )  # fmt: skip
                part.weight, part.exp_avg, part.exp_avg_sq, part.low = results
                what = f"of {implementation} at [{begin}:{end}]"
                found, before = part.fetch(accelerator.to_host), state.slice(begin, end)
                if exact:
                    assert_same_state(found, wanted.slice(begin, end), what)
                else:
                    check_bounds(accelerator, found, before, noise.at(begin), scalars, what=what)
                for rest in ((0, begin), (end, SLICED)):
                    around = whole.slice(*rest).fetch(accelerator.to_host)
                    assert_same_state(around, state.slice(*rest), f"outside, {what}")


@requires(
    level=1,
    must="adamw_bf16_moments that may not keep its results leaves every vector as it was, whatever the gradient holds.",
    needs=needs_gradient,
    since="1.1",
)
@GRADIENT
def test_skipped_update(accelerator: Accelerator, gradient: str) -> None:
    state = narrow_state(1501, dtype_named(gradient))
    broken = state.copy()
    broken.gradient[3], broken.gradient[700], broken.gradient[1500] = math.nan, math.inf, -math.inf
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            for before, scale in itertools.product((state, broken), (SCALE, torch.tensor(math.nan))):
                after = run(accelerator, kernel, before, Noise(5), make_scalars(1), scale, SKIP)
                assert_same_state(after, before, f"of {implementation} after a skipped update")
            control = run(accelerator, kernel, state, Noise(5), make_scalars(1), SCALE)
            assert not torch.equal(control.exp_avg, state.exp_avg)


@requires(
    level=1,
    must="A gradient that is not finite spoils its own element of adamw_bf16_moments and no other.",
    needs=BFLOAT16,
    since="1.1",
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_gradient_that_is_not_finite(accelerator: Accelerator, value: float) -> None:
    places = [0, 15, 1023, 1024, 1499]
    state = narrow_state(1500)
    broken = state.copy()
    broken.gradient[places] = value
    others = torch.ones(1500, dtype=torch.bool)
    others[places] = False
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            wanted = run(accelerator, kernel, state, Noise(9), make_scalars(2), SCALE)
            found = run(accelerator, kernel, broken, Noise(9), make_scalars(2), SCALE)
            for name in ("weight", "exp_avg", "exp_avg_sq"):
                one, other = getattr(found, name), getattr(wanted, name)
                assert not one[places].isfinite().any(), f"{implementation}: {name}"
                assert torch.equal(one[others], other[others]), f"{implementation}: {name} of other elements"
