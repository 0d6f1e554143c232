"""Every implementation of a kernel keeps its schema: against float64, the optimizer of torch, and IEEE 754."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from windlass.accelerator.reference import reference_kernels
from windlass.backends.cpu.kernels import cpu_kernels
from windlass.conformance.kernel_cases import (
    DTYPES,
    KEEP,
    ONE,
    SKIP,
    AdamwState,
    bound_adamw,
    equal_bits,
    every_pattern,
    make_scalars,
    make_state,
    sum_squares,
    values_around,
)

IMPLEMENTATIONS = {
    implementation: {kernel.name: kernel.function for kernel in kernels}
    for implementation, kernels in (("reference", reference_kernels()), ("numba", cpu_kernels()))
}
INF, NAN = math.inf, math.nan


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The kernels of one implementation, by name."""
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
def test_adamw_is_within_its_bounds(
    kernels: dict[str, Any], gradient: torch.dtype, low: torch.dtype | None, decoupled: bool
) -> None:
    state, scalars, scale = make_state(20_011, gradient, low), make_scalars(7, weight_decay=0.1), torch.tensor(0.37)
    bounds = bound_adamw(state, scalars, scale, decoupled=decoupled)
    state.update(kernels["adamw"], scalars, scale, decoupled=decoupled)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        wanted, allowed = getattr(bounds, name)
        error = np.abs(getattr(state, name).double().numpy() - wanted)
        assert (error <= allowed).all(), f"{name} is off by {(error / allowed).max():.2f} of what is allowed"
    if low is not None:
        assert state.low is not None
        assert equal_bits(state.low, state.weight.to(low))


@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_follows_the_optimizer_of_torch(kernels: dict[str, Any], decoupled: bool) -> None:
    state = make_state(1003, low=None)
    state.exp_avg.zero_()
    state.exp_avg_sq.zero_()
    parameter = torch.nn.Parameter(state.weight.clone())
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = optimizer_class([parameter], foreach=False, fused=False, **options)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(1)
    for step in range(1, 51):
        state.gradient = torch.randn(1003, generator=random)
        parameter.grad = state.gradient.clone()
        optimizer.step()
        state.update(kernels["adamw"], make_scalars(step, **options), decoupled=decoupled)  # type: ignore[arg-type]
    wanted = parameter.detach()
    torch.testing.assert_close(state.weight, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
    torch.testing.assert_close(state.exp_avg_sq, optimizer.state[parameter]["exp_avg_sq"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("gradient", "low"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16)])
def test_adamw_does_not_depend_on_slicing(
    kernels: dict[str, Any], gradient: torch.dtype, low: torch.dtype | None
) -> None:
    scalars, scale, before = make_scalars(3), torch.tensor(0.7), make_state(103, gradient, low)
    whole = before.copy()
    whole.update(kernels["adamw"], scalars, scale)
    untouched, wanted = before.bits(), whole.bits()
    for offset in range(33):
        for length in range(71):
            state, end = before.copy(), offset + length
            state.slice(offset, end).update(kernels["adamw"], scalars, scale)
            for found, old, new in zip(state.bits(), untouched, wanted, strict=True):
                assert found == [*old[:offset], *new[offset:end], *old[end:]], f"differs at [{offset}:{end}]"


@pytest.mark.parametrize("gradient", DTYPES)
def test_adamw_of_long_vectors_does_not_depend_on_slicing(kernels: dict[str, Any], gradient: torch.dtype) -> None:
    scalars, whole = make_scalars(3), make_state(70_001, gradient, torch.float16)
    parts = whole.copy()
    whole.update(kernels["adamw"], scalars)
    cuts = [0, 1, 1030, 3077, 4100, 20_483, 65_536, 70_001]
    for begin, end in itertools.pairwise(cuts):
        parts.slice(begin, end).update(kernels["adamw"], scalars)
    assert parts.bits() == whole.bits()


def test_adamw_that_may_not_keep_changes_nothing(kernels: dict[str, Any]) -> None:
    state = make_state(1500)
    state.gradient[3], state.gradient[700] = NAN, INF
    before = state.bits()
    state.update(kernels["adamw"], make_scalars(1), keep=SKIP)
    assert state.bits() == before
    state.update(kernels["adamw"], make_scalars(1), keep=KEEP)
    assert state.weight.isnan().nonzero().flatten().tolist() == [3, 700]


@pytest.mark.parametrize("count", [0, 1])
def test_adamw_of_nothing_and_of_one(kernels: dict[str, Any], count: int) -> None:
    state = AdamwState(torch.ones(count), torch.ones(count), torch.zeros(count), torch.zeros(count), None)
    state.update(kernels["adamw"], make_scalars(1, lr=0.5, betas=(0.5, 0.75), eps=0.0, weight_decay=0.0))
    assert state.weight.tolist() == [0.5] * count  # the first step of Adam is lr times the sign of the gradient
    assert state.exp_avg.tolist() == [0.5] * count
    assert state.exp_avg_sq.tolist() == [0.25] * count


def test_adamw_takes_subnormal_numbers(kernels: dict[str, Any]) -> None:
    tiny = torch.tensor([1e-40, -1e-45, 0.0, -0.0])
    state = AdamwState(tiny.clone(), tiny.clone(), tiny.clone(), tiny.abs(), None)
    state.update(kernels["adamw"], make_scalars(1000, lr=0.0))
    assert torch.equal(state.weight, tiny)
    assert abs(state.exp_avg[0].item() - 1e-40) < 1e-44


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 1023, 1024, 1025, 100_003])
def test_square_sum_is_within_its_bound(kernels: dict[str, Any], dtype: torch.dtype, count: int) -> None:
    random = torch.Generator().manual_seed(count)
    mixed = torch.randn(count, generator=random) * 10 ** (3 * torch.rand(count, generator=random))
    for values in (torch.ones(count), torch.rand(count, generator=random), mixed, mixed.sort().values):
        total, bad = kernels["square_sum"](values.to(dtype), torch.tensor(0.3)).tolist()
        wanted = sum_squares(values.to(dtype), 0.3)
        assert abs(total - wanted) <= 1e-6 * wanted
        assert bad == 0


def test_square_sum_of_many_small_terms_after_a_large_one(kernels: dict[str, Any]) -> None:
    """Added one by one to the first, each of the others would be rounded away."""
    values = torch.full((20_000_000,), 1.0 + 2**-12)
    values[0] = 4096.0
    total, bad = kernels["square_sum"](values, ONE).tolist()
    wanted = 2.0**24 + (len(values) - 1) * (1 + 2**-12) ** 2
    assert abs(total - wanted) <= 1e-6 * wanted
    assert bad == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sum_finds_every_value_that_is_not_finite(kernels: dict[str, Any], dtype: torch.dtype) -> None:
    for value in (INF, -INF, NAN):
        for place in (0, 1, 511, 1023, 1024, 2047, 2048, 2100):
            values = torch.ones(2101, dtype=dtype)
            values[place] = value
            for scale in (1.0, 0.0, 1e-38):
                total, bad = kernels["square_sum"](values, torch.tensor(scale)).tolist()
                assert bad == 1
                assert not math.isfinite(total)


def test_square_sum_that_overflows_is_not_a_bad_value(kernels: dict[str, Any]) -> None:
    for values in (torch.full((3000,), 1e30), torch.full((3000,), 1.5e18)):
        assert kernels["square_sum"](values, ONE).tolist() == [INF, 0.0]


def test_square_sum_depends_on_values_and_length_only(kernels: dict[str, Any]) -> None:
    for count in (70, 5000):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count))
        wanted = kernels["square_sum"](values, ONE)
        for offset in range(33):
            moved = torch.full((count + 40,), NAN)
            moved[offset : offset + count] = values
            assert torch.equal(kernels["square_sum"](moved[offset : offset + count], ONE), wanted)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("destination", DTYPES)
def test_scale_cast_of_every_narrow_value(
    kernels: dict[str, Any], source: torch.dtype, destination: torch.dtype
) -> None:
    values = every_pattern().view(source)
    result = kernels["scale_cast"](torch.empty(len(values), dtype=destination), values, ONE)
    assert equal_bits(result, values.float().to(destination))


@pytest.mark.parametrize("destination", [torch.bfloat16, torch.float16])
def test_scale_cast_rounds_to_nearest_even_around_every_narrow_value(
    kernels: dict[str, Any], destination: torch.dtype
) -> None:
    values = values_around(destination)
    result = kernels["scale_cast"](torch.empty(len(values), dtype=destination), values, ONE)
    assert equal_bits(result, values.to(destination))
    assert int(result.isnan().sum()) == int(values.isnan().sum())


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("destination", DTYPES)
def test_scale_cast_is_exact_and_does_not_depend_on_slicing(
    kernels: dict[str, Any], source: torch.dtype, destination: torch.dtype
) -> None:
    values = (torch.randn(2200, generator=torch.Generator().manual_seed(5)) * 100).to(source)
    scale = torch.tensor(0.1)
    wanted = (values.double() * scale.double()).float().to(destination)  # the product is exact in float64
    for offset in (0, 1, 2, 3, 7, 8, 31, 32):
        for length in (*range(71), 1024, 2100):
            output = torch.full((2200,), 7.0, dtype=destination)
            part = slice(offset, offset + length)
            assert kernels["scale_cast"](output[part], values[part], scale).numel() == length
            assert equal_bits(output[part], wanted[part])
            assert (output[:offset] == 7).all()
            assert (output[offset + length :] == 7).all()
