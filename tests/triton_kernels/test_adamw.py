"""AdamW in Triton against numpy, operation by operation, to the bit."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.accelerator import reference
from windlass.accelerator.reference import noise as chance
from windlass.backends.triton.adamw import BLOCK, adamw, adamw_bf16_moments
from windlass.conformance.kernel_cases import (
    DTYPES,
    KEEP,
    ONE,
    SKIP,
    AdamwState,
    adamw_rounded_stepwise,
    equal_bits,
    make_scalars,
    make_state,
)

COUNTS = (1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)


def widened(state: AdamwState) -> AdamwState:
    """The state with moments of fp32."""
    return AdamwState(state.weight, state.gradient, state.exp_avg.float(), state.exp_avg_sq.float(), state.low)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", DTYPES, ids=str)
def test_each_operation_is_rounded_as_the_standard_says(
    gradient: torch.dtype, low: torch.dtype | None, decoupled: bool
) -> None:
    state = make_state(BLOCK + 77, gradient, low)
    for step in range(1, 4):
        scalars, scale = make_scalars(step, weight_decay=0.1), torch.tensor(1.3 / step)
        wanted = adamw_rounded_stepwise(state, scalars, scale, decoupled=decoupled)
        state.update(adamw, scalars, scale, decoupled=decoupled)
        assert all(map(equal_bits, (state.weight, state.exp_avg, state.exp_avg_sq), wanted))
        assert state.low is None or equal_bits(state.low, state.weight.to(state.low.dtype))


@pytest.mark.parametrize("count", COUNTS)
def test_every_length_and_start(count: int) -> None:
    """Slices of longer vectors, aligned and not; what lies around them stays as it was."""
    for start in (0, 1, 3, 8):
        whole = make_state(count + start + 9, torch.bfloat16)
        before, part = whole.copy(), whole.slice(start, start + count)
        wanted = adamw_rounded_stepwise(part, make_scalars(2), ONE, decoupled=True)
        part.update(adamw, make_scalars(2))
        assert all(map(equal_bits, (part.weight, part.exp_avg, part.exp_avg_sq), wanted))
        assert part.low is not None
        assert equal_bits(part.low, wanted[0].bfloat16())
        for begin, end in ((0, start), (start + count, count + start + 9)):
            assert whole.slice(begin, end).bits() == before.slice(begin, end).bits()


@pytest.mark.parametrize("decoupled", [True, False])
def test_extreme_numbers(decoupled: bool) -> None:
    """Zeros, subnormal, huge, infinite numbers and nan in every combination."""
    values = torch.tensor([0.0, -0.0, 1e-45, -3e-39, 1.2e-38, 1.0, -7.0, 1e19, -2e19, 3.4e38, math.inf, math.nan])
    weight, gradient, exp_avg, exp_avg_sq = (each.flatten() for each in torch.meshgrid([values] * 4, indexing="ij"))
    state = AdamwState(weight, gradient, exp_avg, exp_avg_sq.abs(), torch.empty_like(weight, dtype=torch.bfloat16))
    state = state.copy()
    wanted = adamw_rounded_stepwise(state, make_scalars(2), ONE, decoupled=decoupled)
    state.update(adamw, make_scalars(2), decoupled=decoupled)
    assert all(map(equal_bits, (state.weight, state.exp_avg, state.exp_avg_sq), wanted))
    assert state.low is not None
    assert equal_bits(state.low, wanted[0].bfloat16())


def update_bf16(state: AdamwState, noise: Tensor, keep: Tensor = KEEP, *, step: int = 3) -> None:
    kernel = partial(adamw_bf16_moments, noise=noise)
    state.update(kernel, make_scalars(step, weight_decay=0.1), torch.tensor(0.7), keep)


def make_bf16_state(count: int, gradient: torch.dtype = torch.bfloat16) -> AdamwState:
    state = make_state(count, gradient)
    state.exp_avg, state.exp_avg_sq = state.exp_avg.bfloat16(), state.exp_avg_sq.bfloat16()
    return state


@pytest.mark.parametrize("gradient", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 2**32 - 1100])
def test_bf16_moments_are_rounded_by_the_noise_of_their_elements(gradient: torch.dtype, first: int) -> None:
    state, noise = make_bf16_state(2 * BLOCK + 77, gradient), torch.tensor([2**40 + 3, first])
    w, m, v = adamw_rounded_stepwise(
        widened(state), make_scalars(3, weight_decay=0.1), torch.tensor(0.7), decoupled=True
    )
    drawn = chance.make_noise(noise, m.numel())
    update_bf16(state, noise)
    assert equal_bits(state.weight, w)
    assert equal_bits(state.exp_avg, chance.round_stochastically(m, chance.low_half(drawn)))
    assert equal_bits(state.exp_avg_sq, chance.round_stochastically(v, chance.high_half(drawn)))


def test_bf16_moments_do_not_depend_on_slicing() -> None:
    whole = make_bf16_state(2 * BLOCK + 77)
    parts = whole.copy()
    update_bf16(whole, torch.tensor([5, 2**32 - 700]))
    for begin, end in ((0, 33), (33, BLOCK + 100), (BLOCK + 100, 2 * BLOCK + 77)):
        update_bf16(parts.slice(begin, end), torch.tensor([5, 2**32 - 700 + begin]))
    assert parts.bits() == whole.bits()


def test_bf16_moments_follow_a_small_change_in_the_mean() -> None:
    """A step of a fifth of the last place: rounding to nearest would stay; the mean of many goes on."""
    count = 64 * BLOCK
    state = AdamwState(
        torch.zeros(count), torch.full((count,), 1.0 + 2**-7), torch.ones(count, dtype=torch.bfloat16),
        torch.ones(count, dtype=torch.bfloat16), None,
    )  # fmt: skip
    scalars = make_scalars(9, betas=(0.8, 0.8))
    adamw_bf16_moments(
        state.weight, state.gradient, state.exp_avg, state.exp_avg_sq, scalars, ONE, KEEP, None, torch.tensor([1, 0])
    )
    up = float((state.exp_avg > 1).double().mean())
    assert set(state.exp_avg.double().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert up == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / count))


def test_what_may_not_be_kept_changes_nothing() -> None:
    for broken in (1.0, math.nan, math.inf):
        state, narrow = make_state(BLOCK + 3), make_bf16_state(BLOCK + 3)
        state.gradient[5], narrow.gradient[5] = broken, broken
        before, narrow_before = state.copy(), narrow.copy()
        state.update(adamw, make_scalars(1), torch.tensor(math.nan), SKIP)
        update_bf16(narrow, torch.tensor([1, 2]), SKIP)
        assert state.bits() == before.bits()
        assert narrow.bits() == narrow_before.bits()


def test_no_elements() -> None:
    state = make_state(0)
    state.update(adamw, make_scalars(1))
    assert state.weight.numel() == 0


def test_results_are_the_tensors_that_were_given() -> None:
    state = make_state(5)
    given = (state.weight, state.exp_avg, state.exp_avg_sq, state.low)
    results = adamw(
        state.weight, state.gradient, state.exp_avg, state.exp_avg_sq, make_scalars(1), ONE, KEEP, state.low
    )
    assert all(result is each for result, each in zip(results, given, strict=True))


def test_numbers_may_be_elements_of_a_vector() -> None:
    """Scale and keep are often views into one vector of results."""
    state, plain = make_state(70), make_state(70)
    state.update(adamw, make_scalars(1), torch.tensor([9.0, 0.5])[1], torch.tensor([False, True])[1])
    plain.update(reference.adamw, make_scalars(1), torch.tensor(0.5), KEEP)
    assert equal_bits(state.exp_avg, plain.exp_avg)
    assert equal_bits(state.exp_avg_sq, plain.exp_avg_sq)


@pytest.mark.parametrize(
    ("argument", "wrong", "got"),
    [
        ("gradient", torch.zeros(4), r"contiguous float32\[4\]"),
        ("gradient", torch.zeros(3, dtype=torch.float64), r"contiguous float64\[3\]"),
        ("weight", torch.zeros(3, dtype=torch.bfloat16), r"contiguous bfloat16\[3\]"),
        ("exp_avg", torch.zeros(6)[::2], r"strided float32\[3\]"),
        ("exp_avg_sq", torch.zeros(3, dtype=torch.bfloat16), r"contiguous bfloat16\[3\]"),
        ("low", torch.zeros(3), r"contiguous float32\[3\]"),
        ("scalars", torch.zeros(8), r"contiguous float32\[8\]"),
        ("gradient_scale", torch.tensor(1), r"contiguous int64\[\]"),
        ("keep", torch.tensor(1.0), r"contiguous float32\[\]"),
    ],
)
def test_what_does_not_fit_is_refused(argument: str, wrong: Tensor, got: str) -> None:
    state = make_state(3)
    arguments: dict[str, Any] = {**vars(state), "scalars": make_scalars(1), "gradient_scale": ONE, "keep": KEEP}
    arguments[argument] = wrong
    with pytest.raises(ValueError, match=rf"^kernel 'adamw' got {argument} as {got}, wanted contiguous .*; .*$"):
        adamw(**arguments)
