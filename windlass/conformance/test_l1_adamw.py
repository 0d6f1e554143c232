"""Level 1: adamw against intervals that are computed in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import dtype_named
from windlass.conformance.kernel_cases import (
    AdamwState,
    accept_zeros,
    bound_adamw,
    count_different,
    is_subnormal,
    make_scalars,
    make_state,
    measure_adamw,
    values_around,
)
from windlass.conformance.kernel_runs import (
    KernelFunction,
    each_implementation,
    keeps_subnormal_numbers,
    run_adamw,
)
from windlass.conformance.plugin import Measure
from windlass.conformance.requirements import requires

GRADIENT = pytest.mark.parametrize("gradient", ["float32", "bfloat16", "float16"])
NARROW = pytest.mark.parametrize("low", ["bfloat16", "float16"])
DECOUPLED = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
COUNT = 20_011


@dataclass(frozen=True)
class Case:
    """A state, and the arguments that make it a hard one."""

    state: AdamwState
    step: int = 7
    scale: float = 1.0
    decoupled: bool = True
    options: dict[str, Any] | None = None


def ordinary(**changes: torch.Tensor) -> AdamwState:
    """A state in the middle of a training without a narrow copy, with some vectors replaced."""
    state = make_state(COUNT, low=None)
    for name, values in changes.items():
        setattr(state, name, values)
    return state


def make_cases() -> dict[str, Case]:
    zeros, random = torch.zeros(COUNT), torch.Generator().manual_seed(9)
    normal = torch.randn(COUNT, generator=random)
    weight = 0.1 * normal
    return {
        "first step": Case(ordinary(exp_avg=zeros, exp_avg_sq=zeros), step=1),
        "late step": Case(ordinary(), step=1_000_000),
        "large epsilon": Case(ordinary(), options={"eps": 0.01}),
        "epsilon beside tiny gradients": Case(
            ordinary(gradient=1e-6 * normal, exp_avg=1e-7 * normal, exp_avg_sq=1e-13 * normal**2),
            step=2,
            options={"eps": 1e-6},
        ),
        "large rate and decay": Case(ordinary(), options={"lr": 0.7, "weight_decay": 0.9}),
        "decay without rate": Case(ordinary(), options={"lr": 0.0, "weight_decay": 0.9}),
        "no decay": Case(ordinary(), options={"weight_decay": 0.0}),
        "no memory": Case(ordinary(), options={"betas": (0.0, 0.0)}),
        "long memory": Case(ordinary(), step=3, options={"betas": (0.999, 0.99999)}),
        "moment that nearly vanishes": Case(ordinary(gradient=-9.0 * normal, exp_avg=normal * (1 + 1e-6))),
        "moment equal to the gradient": Case(ordinary(gradient=normal, exp_avg=normal.clone())),
        "weight that nearly vanishes": Case(
            ordinary(
                weight=0.5 * normal.sign() * (1 + 1e-6 * normal), gradient=normal, exp_avg=zeros, exp_avg_sq=zeros
            ),
            step=1,
            options={"lr": 0.5, "weight_decay": 0.0},
        ),
        "decay against the gradient": Case(
            ordinary(weight=weight, gradient=-0.1 * weight * (1 + 1e-6)),
            decoupled=False,
            options={"weight_decay": 0.1},
        ),
        "huge gradients": Case(ordinary(gradient=1e18 * normal, exp_avg=1e17 * normal, exp_avg_sq=1e35 * normal**2)),
        "tiny gradients": Case(ordinary(gradient=1e-21 * normal, exp_avg=1e-40 * normal, exp_avg_sq=1e-42 * normal**2)),
        "small scale": Case(ordinary(gradient=65536.0 * normal), scale=2.0**-16),
        "odd scale": Case(ordinary(), scale=0.3337),
        "nothing but zeros": Case(ordinary(weight=zeros, gradient=zeros, exp_avg=zeros, exp_avg_sq=zeros), step=1),
    }


CASES = make_cases()


def check_bounds(
    accelerator: Accelerator,
    measure: Measure,
    implementation: str,
    adamw: KernelFunction,
    case: Case,
    name: str,
) -> AdamwState:
    """Run a case and compare with its intervals; the worst error goes into the report. Returns the new state."""
    scalars, scale = make_scalars(case.step, **(case.options or {})), torch.tensor(case.scale)
    vanishing = 0.0 if keeps_subnormal_numbers(accelerator) else 2.0**-126
    bounds = bound_adamw(case.state, scalars, scale, decoupled=case.decoupled, vanishing=vanishing)
    found = run_adamw(accelerator, adamw, case.state, scalars, scale, decoupled=case.decoupled)
    shares = measure_adamw(found, bounds)
    worst = max(shares.values()) if not any(map(math.isnan, shares.values())) else math.nan
    measure(
        "kernel", name="adamw", implementation=implementation, case=name, error=worst, bound=1.0,
        unit="of the allowed error",
    )  # fmt: skip
    assert worst <= 1, f"{implementation}: errors as shares of what is allowed are {shares}"
    return found


@requires(
    level=1,
    must="adamw is within 4 ulp of the largest term of each sum, and writes a low copy of exactly the new weight.",
    needs=lambda gradient, low: tuple({f"dtypes:{gradient}", *([] if low == "none" else [f"dtypes:{low}"])}),
)
@DECOUPLED
@GRADIENT
@pytest.mark.parametrize("low", ["none", "bfloat16", "float16"])
def test_bounds(accelerator: Accelerator, measure: Measure, gradient: str, low: str, decoupled: bool) -> None:
    narrow = None if low == "none" else dtype_named(low)
    state = make_state(COUNT, dtype_named(gradient), narrow)
    case = Case(state, scale=0.37, decoupled=decoupled, options={"weight_decay": 0.1})
    name = f"{gradient} gradient, low {low}, {'decoupled' if decoupled else 'l2'}"
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            found = check_bounds(accelerator, measure, implementation, adamw, case, name)
            if narrow is not None:
                assert found.low is not None
                assert found.low.dtype == narrow
                assert count_different(found.low, found.weight.to(narrow)) == 0, f"{implementation}: low copy"


@requires(level=1, must="adamw is within its bounds where terms cancel, and where they are huge, tiny or none.")
@pytest.mark.parametrize("case", CASES)
def test_hard_cases(accelerator: Accelerator, measure: Measure, case: str) -> None:
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            check_bounds(accelerator, measure, implementation, adamw, CASES[case], case)


@requires(
    level=1, must="Fifty steps of adamw follow torch.optim.AdamW, and torch.optim.Adam where decay is in the gradient."
)
@DECOUPLED
def test_follows_torch(accelerator: Accelerator, decoupled: bool) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            state = make_state(1003, low=None)
            state.exp_avg, state.exp_avg_sq = torch.zeros(1003), torch.zeros(1003)
            parameter = torch.nn.Parameter(state.weight.clone())
            optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
            optimizer = optimizer_class([parameter], foreach=False, fused=False, **options)
            random = torch.Generator().manual_seed(1)
            for step in range(1, 51):
                state.gradient = torch.randn(1003, generator=random)
                parameter.grad = state.gradient.clone()
                optimizer.step()
                state = run_adamw(accelerator, adamw, state, make_scalars(step, **options), decoupled=decoupled)
            wanted, second = parameter.detach(), optimizer.state[parameter]["exp_avg_sq"]
            error = float((state.weight - wanted).abs().max() / wanted.abs().max())
            assert error <= 2e-6, f"{implementation}: weights are off by {error:.2g} of the largest"
            assert float(((state.exp_avg_sq - second).abs() / second).max()) <= 2e-6, implementation


@requires(
    level=1,
    must="The low copy of adamw is rounded once, to nearest even, wherever the weight lies between two values.",
    needs=lambda low: f"dtypes:{low}",
)
@NARROW
def test_rounding_of_low_copy(accelerator: Accelerator, measure: Measure, low: str) -> None:
    """Without a rate the weights stay as they are, so that each can be put where rounding is decided."""
    around = values_around(dtype_named(low))
    weight = around[around.isfinite()]
    zeros = torch.zeros_like(weight)
    state = AdamwState(weight, zeros, zeros, zeros, torch.full_like(weight, 7.0, dtype=dtype_named(low)))
    vanishing = is_subnormal(weight) & (not keeps_subnormal_numbers(accelerator))
    with each_implementation(accelerator, "adamw") as turns:
        for implementation, adamw in turns:
            found = run_adamw(accelerator, adamw, state, make_scalars(5, lr=0.0))
            assert found.low is not None
            wrong = count_different(found.low, accept_zeros(weight.to(found.low.dtype), found.low, vanishing))
            measure(
                "kernel", name="adamw", implementation=implementation, dtype=low, case="rounding of the low copy",
                error=wrong, bound=0, unit="wrong elements",
            )  # fmt: skip
            assert wrong == 0, f"{implementation}: {wrong} elements are rounded in another way"
            kept = accept_zeros(weight, found.weight, vanishing)
            assert count_different(found.weight, kept) == 0, f"{implementation}: the weight moves without a rate"
