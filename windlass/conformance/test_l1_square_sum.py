"""Level 1: square_sum against sums that are exact in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import bring, dtype_named
from windlass.conformance.kernel_cases import is_subnormal, sum_squares
from windlass.conformance.kernel_runs import (
    SLICED,
    SLICES,
    KernelFunction,
    each_implementation,
    keeps_subnormal_numbers,
    read_square_sum,
    run_square_sum,
)
from windlass.conformance.plugin import Measure
from windlass.conformance.requirements import requires

DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
TOLERANCE = 1e-6  # relative, as the schema says
INF, NAN = math.inf, math.nan


def share_of_bound(
    accelerator: Accelerator, square_sum: KernelFunction, values: Tensor, scale: float, wanted: float | None = None
) -> float:
    """The error of the sum of host values as a share of what is allowed; the values are all finite."""
    if wanted is None:
        wanted = sum_squares(values, scale)
    least = wanted
    if values.dtype == torch.float32 and is_subnormal(values).any() and not keeps_subnormal_numbers(accelerator):
        least = sum_squares(values[~is_subnormal(values)], scale)
    total, bad = run_square_sum(accelerator, square_sum, values, scale)
    assert bad == 0, "every value is finite"
    if wanted == 0:
        return abs(total)
    return max(least - total, total - wanted, 0.0) / (TOLERANCE * wanted)


def check_sums(accelerator: Accelerator, measure: Measure, name: str, sums: list[tuple[Tensor, float]]) -> None:
    """Compare every implementation with sums that are exact, and note the worst error of each."""
    exact = [sum_squares(values, scale) for values, scale in sums]
    with each_implementation(accelerator, "square_sum") as turns:
        for implementation, square_sum in turns:
            shares = [
                share_of_bound(accelerator, square_sum, values, scale, wanted)
                for (values, scale), wanted in zip(sums, exact, strict=True)
            ]
            note(measure, implementation, name, max(shares))
            assert all(share <= 1 for share in shares), f"{implementation}: shares of what is allowed are {shares}"


def note(measure: Measure, implementation: str, case: str, worst: float) -> None:
    measure(
        "kernel", name="square_sum", implementation=implementation, case=case, error=worst, bound=1.0,
        unit="of the allowed error",
    )  # fmt: skip


@requires(
    level=1,
    must="square_sum is within 1e-6 of the sum of the squares, whatever the number and order of the terms.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@DTYPE
@pytest.mark.parametrize("count", [0, 1, 2, 15, 1023, 1024, 1025, 100_003])
def test_sum(accelerator: Accelerator, measure: Measure, dtype: str, count: int) -> None:
    random = torch.Generator().manual_seed(count)
    mixed = torch.randn(count, generator=random) * 10 ** (3 * torch.rand(count, generator=random))
    vectors = (torch.ones(count), torch.rand(count, generator=random), mixed, mixed.sort().values)
    sums = [(values.to(dtype_named(dtype)), scale) for values in vectors for scale in (1.0, 0.3)]
    check_sums(accelerator, measure, f"{count} of {dtype}", sums)


@requires(level=1, must="square_sum loses none of many small terms beside a large one.")
def test_many_small_terms(accelerator: Accelerator, measure: Measure) -> None:
    """Added one by one to the first, each of the others would be rounded away."""
    count, small = 20_000_000, 1.0 + 2**-12
    values = torch.full((count,), small)
    values[0] = 4096.0
    wanted = 2.0**24 + (count - 1) * small**2
    with each_implementation(accelerator, "square_sum") as turns:
        for implementation, square_sum in turns:
            share = share_of_bound(accelerator, square_sum, values, 1.0, wanted)
            note(measure, implementation, "many small terms beside a large one", share)
            assert share <= 1, f"{implementation}: off by {share:.2f} of what is allowed"


@requires(level=1, must="square_sum scales before it squares, so that a sum that fits is found.")
def test_range(accelerator: Accelerator, measure: Measure) -> None:
    """Squares near the top of float32, and values whose own squares would be infinite or nothing."""
    smallest = torch.tensor([1, 3, 12345, 0x7FFFFF], dtype=torch.int32).view(torch.float32)
    sums = [
        (torch.tensor([1e19, -1e19, 1e19]), 1.0),
        (torch.full((33,), 3e18), 1.0),
        (torch.full((1025,), 1e25), 1e-10),
        (torch.full((1025,), -3e38), 2.0**-100),
        (torch.full((1025,), 1e-30), 1e15),
        (smallest.repeat(300), 2.0**120),
        (torch.zeros(1025), 1.0),
        (torch.full((70,), 1e10), 0.0),
    ]
    check_sums(accelerator, measure, "huge and tiny values", sums)


@requires(level=1, must="A sum that overflows is inf, and no sign of a value that is not finite.")
def test_overflow(accelerator: Accelerator) -> None:
    with each_implementation(accelerator, "square_sum") as turns:
        for implementation, square_sum in turns:
            for values in (torch.full((3000,), 1e30), torch.full((3000,), 1.5e18), torch.tensor([-3e38])):
                assert run_square_sum(accelerator, square_sum, values) == (INF, 0.0), implementation


@requires(
    level=1,
    must="square_sum reports every inf and nan, in the first place as in the last, whatever the scale.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@DTYPE
def test_not_finite(accelerator: Accelerator, dtype: str) -> None:
    with each_implementation(accelerator, "square_sum") as turns:
        for implementation, square_sum in turns:
            for count in (1, 7, 2101):
                ones = torch.ones(count, dtype=dtype_named(dtype))
                assert run_square_sum(accelerator, square_sum, ones) == (count, 0.0)  # the control
                for place in sorted(
                    {0, count // 2, count - 1, *({511, 1023, 1024, 2047, 2048} if count > 2048 else ())}
                ):
                    for value, scale in ((INF, 1.0), (-INF, 1e-38), (NAN, 1.0), (NAN, 0.0), (INF, 0.0)):
                        values = ones.clone()
                        values[place] = value
                        total, bad = run_square_sum(accelerator, square_sum, values, scale)
                        assert bad == 1, f"{implementation}: {value} at {place} of {count}, scale {scale}"
                        assert not math.isfinite(total), implementation


@requires(
    level=1,
    must="square_sum depends on the values and their number, not on where they lie or what lies around them.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@DTYPE
def test_slices(accelerator: Accelerator, dtype: str) -> None:
    values = torch.randn(SLICED, generator=torch.Generator().manual_seed(2)).to(dtype_named(dtype))
    with each_implementation(accelerator, "square_sum") as turns:
        for implementation, square_sum in turns:
            for begin, end in SLICES:
                length = end - begin
                wanted = run_square_sum(accelerator, square_sum, values[:length], 0.3)
                around = torch.full((SLICED,), NAN, dtype=values.dtype)
                around[begin:end] = values[:length]
                part = bring(accelerator, around)[begin:end]
                found = read_square_sum(accelerator, square_sum, part, 0.3, values[:length])
                assert found == wanted, f"{implementation} at [{begin}:{end}]"
