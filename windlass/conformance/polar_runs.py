"""What the kernels polar and polar_gram are asked alike: each implementation, held against bounds of its schema."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS, Coefficients
from windlass.conformance.allocations import assert_same_bits
from windlass.conformance.kernel_cases import Doubles
from windlass.conformance.kernel_runs import each_implementation, run_polar
from windlass.conformance.plugin import Measure
from windlass.conformance.polar_cases import PolarBounds

JORDAN = COEFFICIENTS["jordan"]


def check_polar(
    accelerator: Accelerator,
    measure: Measure,
    kernel: str,
    case: str,
    stack: Tensor,
    bounds: PolarBounds,
    coefficients: Coefficients,
    product_dtype: torch.dtype,
    check_more: Callable[[Doubles, str], None] = lambda found, what: None,  # of one implementation's results
) -> None:
    """Compare every implementation with the tolerance of the schema, matrix by matrix, and note the worst."""
    with each_implementation(accelerator, kernel) as turns:
        for implementation, function in turns:
            found = run_polar(accelerator, function, stack, coefficients, product_dtype).double().numpy()
            errors = np.sqrt(((found - bounds.wanted) ** 2).sum((-2, -1)))
            shares = np.where(errors == 0, 0, errors / np.maximum(bounds.allowed, 1e-300))
            measure(
                "kernel", name=kernel, implementation=implementation, case=case, error=float(shares.max()),
                bound=1.0, unit="of the allowed error",
            )  # fmt: skip
            assert (shares <= 1).all(), f"{implementation}, {case}: shares of what is allowed are {shares}"
            check_more(found, f"{implementation}, {case}")


def check_zeros(accelerator: Accelerator, kernel: str, product_dtype: torch.dtype) -> None:
    """Zeros stay zeros in a matrix, in rows and in columns, beside what is none, and of nothing comes nothing."""
    stack = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(7))
    stack[0], stack[1, 4:], stack[2, :, 11:] = 0, 0, 0
    empty = torch.zeros(0, 9, 14)
    with each_implementation(accelerator, kernel) as turns:
        for implementation, function in turns:
            found = run_polar(accelerator, function, stack, JORDAN, product_dtype)
            for part in (found[0], found[1, 4:], found[2, :, 11:]):
                assert torch.equal(part, torch.zeros_like(part)), f"{implementation}: zeros do not stay zeros"
            norms = found[1:].square().sum((-2, -1)).sqrt()
            assert (norms > 1).all(), f"{implementation}: what is beside the zeros has norms {norms.tolist()}"
            assert_same_bits(run_polar(accelerator, function, empty, JORDAN, product_dtype), empty, implementation)


def check_not_finite(
    accelerator: Accelerator, kernel: str, value: float, find_bounds: Callable[[Tensor], PolarBounds]
) -> None:
    """The matrix that holds the value is nan everywhere, and its neighbours are within their bounds."""
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(8))
    stack[1, 7, 3] = value
    bounds = find_bounds(stack[[0, 2]])
    with each_implementation(accelerator, kernel) as turns:
        for implementation, function in turns:
            found = run_polar(accelerator, function, stack, JORDAN)
            assert found[1].isnan().all(), f"{implementation}: a matrix with {value} is not nan everywhere"
            errors = np.sqrt(((found[[0, 2]].double().numpy() - bounds.wanted) ** 2).sum((-2, -1)))
            assert (errors <= bounds.allowed).all(), f"{implementation}: its neighbours are off by {errors}"
