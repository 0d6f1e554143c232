"""Level 1: scale_cast, which is exact: a product in float32, rounded once to the destination's dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_holds, assert_same_bits, bring, dtype_named
from windlass.conformance.kernel_cases import (
    accept_zeros,
    count_different,
    every_pattern,
    is_subnormal,
    values_around,
)
from windlass.conformance.kernel_runs import (
    SLICED,
    SLICES,
    each_implementation,
    keeps_subnormal_numbers,
    run_scale_cast,
)
from windlass.conformance.plugin import Measure
from windlass.conformance.requirements import requires

DTYPES = ("float32", "bfloat16", "float16")
SOURCE = pytest.mark.parametrize("source", DTYPES)
DESTINATION = pytest.mark.parametrize("destination", DTYPES)
NARROW_SOURCE = pytest.mark.parametrize("source", ["bfloat16", "float16"])
NARROW_DESTINATION = pytest.mark.parametrize("destination", ["bfloat16", "float16"])


def both(source: str, destination: str) -> tuple[str, ...]:
    return tuple(sorted({f"dtypes:{source}", f"dtypes:{destination}"}))


def round_product(values: Tensor, scale: float, destination: torch.dtype) -> Tensor:
    """The product is exact in float64; it is rounded to float32 and then to the destination."""
    return (values.double() * torch.tensor(scale).double()).float().to(destination)


def check_exact(
    accelerator: Accelerator, measure: Measure, case: str, values: Tensor, destination: torch.dtype, scale: float
) -> None:
    exact = round_product(values, scale, destination)
    product = values.double() * torch.tensor(scale).double()
    vanishing = is_subnormal(values.float()) | (product.abs() < 2.0**-126)
    if keeps_subnormal_numbers(accelerator):
        vanishing = torch.zeros_like(vanishing)
    with each_implementation(accelerator, "scale_cast") as turns:
        for implementation, scale_cast in turns:
            found = run_scale_cast(accelerator, scale_cast, values, destination, scale)
            wanted = accept_zeros(exact, found, vanishing)
            wrong = count_different(found, wanted)
            measure(
                "kernel", name="scale_cast", implementation=implementation, case=case, error=wrong, bound=0,
                unit="wrong elements",
            )  # fmt: skip
            assert wrong == 0, f"{implementation}: {wrong} of {values.numel()} elements differ at scale {scale}"


@requires(level=1, must="scale_cast maps every value of a 16-bit dtype, subnormal or infinite, exactly.", needs=both)
@NARROW_SOURCE
@DESTINATION
@pytest.mark.parametrize("scale", [1.0, -0.1, 2.0**-16, 2.0**120], ids=["1", "-0.1", "2^-16", "2^120"])
def test_every_narrow_value(
    accelerator: Accelerator, measure: Measure, source: str, destination: str, scale: float
) -> None:
    values = every_pattern().view(dtype_named(source))
    case = f"every {source} to {destination}, scale {scale:g}"
    check_exact(accelerator, measure, case, values, dtype_named(destination), scale)


@requires(
    level=1,
    must="scale_cast rounds once, to nearest even: at each 16-bit value, halfway to the next, and right beside both.",
    needs=lambda destination: f"dtypes:{destination}",
)
@NARROW_DESTINATION
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rounding(accelerator: Accelerator, measure: Measure, destination: str, scale: float) -> None:
    values = values_around(dtype_named(destination))
    check_exact(
        accelerator, measure, f"around every {destination}, scale {scale:g}", values, dtype_named(destination), scale
    )


@requires(level=1, must="scale_cast multiplies in float32, whatever the dtypes.", needs=both)
@SOURCE
@DESTINATION
def test_product(accelerator: Accelerator, measure: Measure, source: str, destination: str) -> None:
    values = (torch.randn(20_011, generator=torch.Generator().manual_seed(5)) * 100).to(dtype_named(source))
    for scale in (0.1, 1 / 3, -7.7e-5, 0.0, -0.0):
        check_exact(
            accelerator,
            measure,
            f"{source} to {destination}, scale {scale:.2g}",
            values,
            dtype_named(destination),
            scale,
        )


@requires(level=1, must="scale_cast overflows to inf and keeps inf, nan and the sign of zero.", needs=both)
@SOURCE
@DESTINATION
def test_special_values(accelerator: Accelerator, measure: Measure, source: str, destination: str) -> None:
    host = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, -65504.0, 65519.0, 65520.0, 3.3e38, -3.3e38, 3.4e38]
    values = torch.tensor(host).to(dtype_named(source))
    for scale in (1.0, 3.0, -1.0, math.inf, math.nan, 1e38):
        case = f"special values, {source} to {destination}, scale {scale:g}"
        check_exact(accelerator, measure, case, values, dtype_named(destination), scale)


@requires(
    level=1,
    must="scale_cast loses no bit of subnormal numbers of float32, on a device whose arithmetic keeps them; elsewhere "
    "they may be zero and nothing else.",
)
def test_subnormal_numbers(accelerator: Accelerator) -> None:
    """Compared as multiples of the smallest number, so that a host that flushes them cannot agree by mistake."""
    keeps = keeps_subnormal_numbers(accelerator)
    source = torch.tensor([1, 3, 1000, 0x7FFFFF, -0x7FFFFFFF, 0x00C00000, 0x01400000], dtype=torch.int32)
    halved = torch.tensor([0, 2, 500, 0x400000, -0x80000000, 0x00600000, 0x00C00000], dtype=torch.int32)
    with each_implementation(accelerator, "scale_cast") as turns:
        for implementation, scale_cast in turns:
            for scale, wanted in ((1.0, source), (0.5, halved)):
                floats, exact = source.view(torch.float32), wanted.view(torch.float32)
                found = run_scale_cast(accelerator, scale_cast, floats, torch.float32, scale)
                vanishing = (is_subnormal(floats) | is_subnormal(exact)) & (not keeps)
                allowed = accept_zeros(exact, found, vanishing).view(torch.int32)
                assert_same_bits(found.view(torch.int32), allowed, f"{implementation} at scale {scale}")


@requires(level=1, must="scale_cast of no elements and of one is right.", needs=both)
@SOURCE
@DESTINATION
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_elements(accelerator: Accelerator, measure: Measure, source: str, destination: str, count: int) -> None:
    values = torch.tensor([-3.3, 0.7])[:count].to(dtype_named(source))
    check_exact(accelerator, measure, f"{count} of {source} to {destination}", values, dtype_named(destination), 1.7)


@requires(
    level=1,
    must="A slice gets the bits from scale_cast that it gets alone, and nothing around it is written.",
    needs=both,
)
@SOURCE
@DESTINATION
def test_slices(accelerator: Accelerator, source: str, destination: str) -> None:
    values = (torch.randn(SLICED, generator=torch.Generator().manual_seed(6)) * 50).to(dtype_named(source))
    wanted = round_product(values, 0.1, dtype_named(destination))
    blank = torch.full((SLICED,), 7.0, dtype=dtype_named(destination))
    scale = bring(accelerator, torch.tensor(0.1))
    on_device = bring(accelerator, values)
    with each_implementation(accelerator, "scale_cast") as turns:
        for implementation, scale_cast in turns:
            for begin, end in SLICES:
                shifted = slice(begin + 3, end + 3) if end + 3 <= SLICED else slice(begin, end)
                whole = bring(accelerator, blank)
                result = scale_cast(whole[shifted], on_device[begin:end], scale)
                what = f"of {implementation} at [{begin}:{end}]"
                assert_holds(accelerator, result, wanted[begin:end], f"the result {what}")
                assert_holds(accelerator, whole[: shifted.start], blank[: shifted.start], f"before the result {what}")
                assert_holds(accelerator, whole[shifted.stop :], blank[shifted.stop :], f"after the result {what}")
