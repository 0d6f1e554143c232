"""Level 1: what adamw keeps, skips and does not touch, and that slicing changes no bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import REFERENCE
from windlass.conformance.allocations import assert_same_bits, dtype_named
from windlass.conformance.kernel_cases import (
    SKIP,
    AdamwState,
    accept_zeros,
    bound_adamw,
    is_subnormal,
    make_scalars,
    make_state,
    measure_adamw,
)
from windlass.conformance.kernel_runs import (
    SLICED,
    SLICES,
    assert_same_state,
    each_implementation,
    keeps_subnormal_numbers,
    run_adamw,
    run_adamw_on_slice,
)
from windlass.conformance.requirements import requires

GRADIENT = pytest.mark.parametrize("gradient", ["float32", "bfloat16", "float16"])
SCALE = torch.tensor(0.7)


def low_for(gradient: str) -> torch.dtype | None:
    """A narrow copy of the weight where the gradient is narrow, so that one test needs one dtype."""
    return None if gradient == "float32" else dtype_named(gradient)


@requires(
    level=1,
    must="adamw that may not keep its results leaves every vector as it was, whatever the gradient holds.",
    needs=lambda gradient: f"dtypes:{gradient}",
)
@GRADIENT
def test_skipped_update(accelerator: Accelerator, gradient: str) -> None:
    state = make_state(1501, dtype_named(gradient), low_for(gradient))
    broken = state.copy()
    broken.gradient[3], broken.gradient[700], broken.gradient[1500] = math.nan, math.inf, -math.inf
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            for before in (state, broken):
                for scale in (SCALE, torch.tensor(math.nan)):
                    after = run_adamw(accelerator, adamw, before, make_scalars(1), scale, SKIP)
                    assert_same_state(after, before, f"of {implementation} after a skipped update")
            control = run_adamw(accelerator, adamw, state, make_scalars(1), SCALE)
            assert not torch.equal(control.weight, state.weight)


@requires(level=1, must="A gradient that is not finite spoils its own element of adamw and no other.")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_gradient_that_is_not_finite(accelerator: Accelerator, value: float) -> None:
    places = [0, 15, 1023, 1024, 2099, 2100]
    state = make_state(SLICED, low=None)
    broken = state.copy()
    broken.gradient[places] = value
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            wanted = run_adamw(accelerator, adamw, state, make_scalars(2), SCALE)
            found = run_adamw(accelerator, adamw, broken, make_scalars(2), SCALE)
            for name in ("weight", "exp_avg", "exp_avg_sq"):
                one, other = getattr(found, name), getattr(wanted, name)
                assert not one[places].isfinite().any(), f"{implementation}: {name}"
                whole = torch.ones(SLICED, dtype=torch.bool)
                whole[places] = False
                assert torch.equal(one[whole], other[whole]), f"{implementation}: {name} of other elements"


@requires(level=1, must="adamw of no elements and of one is right, to the bit where the numbers are exact.")
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_elements(accelerator: Accelerator, count: int) -> None:
    scalars = make_scalars(1, lr=0.5, betas=(0.5, 0.75), eps=0.0, weight_decay=0.0)
    state = AdamwState(torch.ones(count), torch.full((count,), -3.0), torch.zeros(count), torch.zeros(count), None)
    wanted = AdamwState(  # the first step of Adam is the rate times the sign of the gradient
        torch.full((count,), 1.5), state.gradient, torch.full((count,), -1.5), torch.full((count,), 2.25), None
    )
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            assert_same_state(run_adamw(accelerator, adamw, state, scalars), wanted, f"of {implementation}")


def check_part(
    accelerator: Accelerator,
    implementation: str,
    found: AdamwState,
    whole: AdamwState,
    before: AdamwState,
    scalars: torch.Tensor,
    part: slice,
    what: str,
) -> None:
    """A part has the bits of the whole; both are within the bounds if a reference on a lazy device gave them."""
    wanted = whole.slice(part.start, part.stop)
    if implementation != REFERENCE or not accelerator.capabilities.lazy:
        assert_same_state(found, wanted, what)
        return
    vanishing = 0.0 if keeps_subnormal_numbers(accelerator) else 2.0**-126
    given = before.slice(part.start, part.stop)
    bounds = bound_adamw(given, scalars, SCALE, decoupled=True, vanishing=vanishing)
    for state in (found, wanted):
        assert max(measure_adamw(state, bounds).values()) <= 1, what
        if state.low is not None:
            assert_same_bits(state.low, state.weight.to(state.low.dtype), f"low {what}")


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@requires(
    level=1,
    must="adamw computes subnormal numbers of float32 exactly in every vector, on a device whose arithmetic keeps "
    "them; elsewhere they may be zero and nothing else.",
)
def test_subnormal_numbers(accelerator: Accelerator) -> None:
    """In units of the smallest number: halving even multiples is exact, and so is comparing them as integers."""
    keeps = keeps_subnormal_numbers(accelerator)
    zeros = torch.zeros(4)
    state = AdamwState(from_bits(2, 4, 1000, 6), zeros, from_bits(2, 4, 1000, 6), from_bits(2, 4, 1000, 6), None)
    wanted = AdamwState(state.weight, zeros, from_bits(1, 2, 500, 3), from_bits(1, 2, 500, 3), None)
    scalars = make_scalars(1000, lr=0.0, betas=(0.5, 0.5))
    subnormal = AdamwState(zeros, from_bits(8, 80, 1000, 24), zeros, zeros, None)
    halved = AdamwState(zeros, subnormal.gradient, from_bits(4, 40, 500, 12), zeros, None)
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            for before, after in ((state, wanted), (subnormal, halved)):
                found = run_adamw(accelerator, adamw, before, scalars)
                allowed = after.copy()
                for name in ("weight", "exp_avg", "exp_avg_sq"):
                    exact = getattr(after, name)
                    vanishing = is_subnormal(exact) & (not keeps)
                    setattr(allowed, name, accept_zeros(exact, getattr(found, name), vanishing))
                assert_same_state(found, allowed, f"of {implementation}")


@requires(
    level=1,
    must="A slice gets the bits from adamw that it gets within the whole, and nothing around it is written.",
    needs=lambda gradient: f"dtypes:{gradient}",
)
@GRADIENT
def test_slices(accelerator: Accelerator, gradient: str) -> None:
    state, scalars = make_state(SLICED, dtype_named(gradient), low_for(gradient)), make_scalars(3)
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            wanted = run_adamw(accelerator, adamw, state, scalars, SCALE)
            for begin, end in SLICES:
                found = run_adamw_on_slice(accelerator, adamw, state, scalars, SCALE, slice(begin, end))
                what = f"of {implementation} at [{begin}:{end}]"
                check_part(accelerator, implementation, found, wanted, state, scalars, slice(begin, end), what)


@requires(
    level=1,
    must="A long vector that is updated in parts gets the bits that it gets as a whole.",
    needs=lambda gradient: f"dtypes:{gradient}",
)
@GRADIENT
def test_long_vector_in_parts(accelerator: Accelerator, gradient: str) -> None:
    state, scalars = make_state(70_001, dtype_named(gradient), low_for(gradient)), make_scalars(3)
    cuts = [0, 1, 1030, 3077, 4100, 20_483, 65_536, 70_001]
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            wanted = run_adamw(accelerator, adamw, state, scalars, SCALE)
            for begin, end in itertools.pairwise(cuts):
                found = run_adamw(accelerator, adamw, state.slice(begin, end), scalars, SCALE)
                what = f"of {implementation} at [{begin}:{end}]"
                check_part(accelerator, implementation, found, wanted, state, scalars, slice(begin, end), what)
