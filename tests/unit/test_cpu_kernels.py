"""The compiled kernels of the processor: rounded by the book, quick to call, and hard to misuse."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from windlass.accelerator import reference
from windlass.accelerator.counters import Counters
from windlass.accelerator.kernels import Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.cpu.kernels import adamw, cpu_kernels, scale_cast, square_sum
from windlass.conformance.kernel_cases import (
    DTYPES,
    KEEP,
    ONE,
    AdamwState,
    adamw_rounded_stepwise,
    equal_bits,
    make_scalars,
    make_state,
)


def test_compiled_kernels_are_chosen_over_the_reference() -> None:
    kernels = Kernels(SCHEMAS, (*reference_kernels(), *cpu_kernels()), Counters())
    compiled = {"adamw", "scale_cast", "square_sum", "momentum_blend", "scale_decay_update"}
    assert {name for name, implementation in kernels.chosen().items() if implementation == "numba"} == compiled


def test_importing_the_backend_does_not_import_the_compiler() -> None:
    code = "import sys, windlass.backends.cpu; print('numba' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert found.split() == ["False", "False"]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 30_011])
def test_adamw_rounds_each_operation_as_the_standard_says(gradient: torch.dtype, count: int, decoupled: bool) -> None:
    state = make_state(count, gradient)
    for step in range(1, 6):
        scalars, scale = make_scalars(step, weight_decay=0.1), torch.tensor(1.3 / step)
        wanted = adamw_rounded_stepwise(state, scalars, scale, decoupled=decoupled)
        state.update(adamw, scalars, scale, decoupled=decoupled)
        assert all(map(equal_bits, (state.weight, state.exp_avg, state.exp_avg_sq), wanted))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("gradient", DTYPES)
def test_adamw_differs_from_the_reference_by_its_square_root_only(gradient: torch.dtype, decoupled: bool) -> None:
    """The moments are equal to the bit; torch's vectorised square root may be off by one in the last place."""
    compiled, scalars = make_state(30_011, gradient, low=None), make_scalars(5, weight_decay=0.1)
    plain, before = compiled.copy(), compiled.weight.clone()
    compiled.update(adamw, scalars, decoupled=decoupled)
    plain.update(reference.adamw, scalars, decoupled=decoupled)
    assert equal_bits(compiled.exp_avg, plain.exp_avg)
    assert equal_bits(compiled.exp_avg_sq, plain.exp_avg_sq)
    allowed = 2**-23 * (torch.maximum(plain.weight.abs(), before.abs()) + 3 * (plain.weight - before).abs())
    assert bool(((compiled.weight - plain.weight).abs() <= allowed).all())


@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_of_extreme_numbers(decoupled: bool) -> None:
    """Zeros, subnormal, huge, infinite numbers and nan in every combination."""
    values = torch.tensor([0.0, -0.0, 1e-45, -3e-39, 1.2e-38, 1.0, -7.0, 1e19, -2e19, 3.4e38, math.inf, math.nan])
    weight, gradient, exp_avg, exp_avg_sq = (each.flatten() for each in torch.meshgrid([values] * 4, indexing="ij"))
    state = AdamwState(weight, gradient, exp_avg, exp_avg_sq.abs(), None).copy()
    wanted = adamw_rounded_stepwise(state, make_scalars(2), ONE, decoupled=decoupled)
    state.update(adamw, make_scalars(2), decoupled=decoupled)
    assert all(map(equal_bits, (state.weight, state.exp_avg, state.exp_avg_sq), wanted))


def test_results_are_the_tensors_that_were_given() -> None:
    state = make_state(5)
    given = (state.weight, state.exp_avg, state.exp_avg_sq, state.low)
    results = adamw(
        state.weight, state.gradient, state.exp_avg, state.exp_avg_sq, make_scalars(1), ONE, KEEP, state.low
    )
    assert all(result is each for result, each in zip(results, given, strict=True))
    destination = torch.empty(5, dtype=torch.float16)
    assert scale_cast(destination, state.weight, ONE) is destination


def test_scale_cast_works_in_place() -> None:
    values = torch.arange(3000.0)
    assert scale_cast(values, values, torch.tensor(2.0)).tolist() == [2.0 * i for i in range(3000)]
    halves = torch.ones(3000, dtype=torch.float16)
    assert scale_cast(halves, halves, torch.tensor(0.5)).tolist() == [0.5] * 3000


@pytest.mark.parametrize(
    ("argument", "wrong", "got"),
    [
        ("gradient", torch.zeros(4), r"contiguous float32\[4\]"),
        ("gradient", torch.zeros(3, dtype=torch.float64), r"contiguous float64\[3\]"),
        ("weight", torch.zeros(3, dtype=torch.bfloat16), r"contiguous bfloat16\[3\]"),
        ("exp_avg", torch.zeros(6)[::2], r"strided float32\[3\]"),
        ("exp_avg_sq", torch.zeros(3, device="meta"), r"contiguous float32\[3\] on meta"),
        ("low", torch.zeros(3), r"contiguous float32\[3\]"),
        ("scalars", torch.zeros(8), r"contiguous float32\[8\]"),
        ("gradient_scale", torch.tensor(1), r"contiguous int64\[\]"),
        ("keep", torch.tensor(1.0), r"contiguous float32\[\]"),
    ],
)
def test_adamw_refuses_what_does_not_fit(argument: str, wrong: torch.Tensor, got: str) -> None:
    state = make_state(3)
    arguments: dict[str, Any] = {**vars(state), "scalars": make_scalars(1), "gradient_scale": ONE, "keep": KEEP}
    arguments[argument] = wrong
    with pytest.raises(ValueError, match=rf"^kernel 'adamw' got {argument} as {got}.*, wanted contiguous .*; .*\.?$"):
        adamw(**arguments)


def test_other_kernels_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^kernel 'square_sum' got values as contiguous int64\[2\] on cpu"):
        square_sum(torch.tensor([1, 2]), ONE)
    with pytest.raises(ValueError, match=r"^kernel 'square_sum' got scale as contiguous float32\[2\] on cpu"):
        square_sum(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"^kernel 'scale_cast' got source as contiguous float32\[3\] on cpu"):
        scale_cast(torch.ones(2), torch.ones(3), ONE)


def test_a_call_costs_little() -> None:
    """A step makes dozens of calls; each is to cost about 10 microseconds, and 50 leave room for a busy machine."""
    state, scalars = make_state(8), make_scalars(1)
    calls: dict[str, Callable[[], object]] = {
        "adamw": lambda: state.update(adamw, scalars),
        "square_sum": lambda: square_sum(state.weight, ONE),
        "scale_cast": lambda: scale_cast(state.weight, state.weight, ONE),
    }
    for name, call in calls.items():
        seconds = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 50e-6, f"a call of {name} costs {min(seconds) * 1e6:.0f} us"
