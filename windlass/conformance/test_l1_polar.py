"""Level 1: polar, whose result is known by singular values: each goes through the polynomials of the steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS, Coefficients
from windlass.conformance.allocations import dtype_named
from windlass.conformance.kernel_cases import Doubles
from windlass.conformance.kernel_runs import each_implementation, run_polar
from windlass.conformance.plugin import Measure
from windlass.conformance.polar_cases import bound_polar, make_matrices
from windlass.conformance.polar_runs import JORDAN, check_not_finite, check_polar, check_zeros
from windlass.conformance.requirements import requires

SET = pytest.mark.parametrize("coefficients", COEFFICIENTS)
PRODUCT = pytest.mark.parametrize("product", ["float32", "bfloat16", "float16"])


def check_bounds(
    accelerator: Accelerator,
    measure: Measure,
    case: str,
    stack: Tensor,
    coefficients: Coefficients = JORDAN,
    product_dtype: torch.dtype = torch.float32,
) -> None:
    """Compare every implementation with the tolerance of the schema, matrix by matrix, and note the worst."""
    bounds = bound_polar(stack, coefficients, product_dtype)
    unit = max(torch.finfo(product_dtype).eps, torch.finfo(stack.dtype).eps)

    def check_largest(found: Doubles, what: str) -> None:
        largest = float(np.linalg.norm(found, 2, (-2, -1)).max())
        assert largest <= bounds.largest * (1 + 4 * unit), f"{what}: {largest} is too large"

    check_polar(accelerator, measure, "polar", case, stack, bounds, coefficients, product_dtype, check_largest)


@requires(
    level=1,
    must="polar sends each singular value through its polynomials, whatever the spectrum and the rank.",
    needs=lambda product: f"dtypes:{product}",
)
@SET
@PRODUCT
def test_bounds(accelerator: Accelerator, measure: Measure, coefficients: str, product: str) -> None:
    for shape in ((40, 72), (72, 40)):
        stack = torch.stack(list(make_matrices(*shape).values()))
        case = f"{shape[0]} x {shape[1]}, {coefficients}, products in {product}"
        check_bounds(accelerator, measure, case, stack, COEFFICIENTS[coefficients], dtype_named(product))


@requires(level=1, must="polar is within its bounds for one row, one column, few of them, and square matrices.")
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (3, 50), (50, 3), (7, 7), (7, 64)], ids=str)
def test_small_shapes(accelerator: Accelerator, measure: Measure, shape: tuple[int, int]) -> None:
    stack = torch.stack(list(make_matrices(*shape, seed=20).values()))
    for name in ("jordan", "polar_express"):
        check_bounds(accelerator, measure, f"{shape[0]} x {shape[1]}, {name}", stack, COEFFICIENTS[name])


@requires(level=1, must="polar of larger matrices is within its bounds, so that sums of products keep their precision.")
def test_larger_matrices(accelerator: Accelerator, measure: Measure) -> None:
    matrices = make_matrices(160, 512, seed=40)
    stack = torch.stack([matrices[name] for name in ("gaussian", "1/k", "a third of the rank")])
    check_bounds(accelerator, measure, "160 x 512", stack)


@requires(
    level=1,
    must="polar of matrices so large that a device may take another way is within its bounds in 16 bits too.",
    needs=lambda product: f"dtypes:{product}",
    since="1.1",
)
@pytest.mark.parametrize("product", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(272, 330), (300, 256)], ids=str)
def test_large_matrices_in_16_bits(
    accelerator: Accelerator, measure: Measure, shape: tuple[int, int], product: str
) -> None:
    stack = make_matrices(*shape, seed=50)["1/k"][None]
    check_bounds(accelerator, measure, f"{shape[0]} x {shape[1]}", stack, JORDAN[1:4], dtype_named(product))


@requires(level=1, must="polar does not depend on the scale of a matrix, from 1e-12 to the top of float32.")
def test_scale(accelerator: Accelerator, measure: Measure) -> None:
    matrices = list(make_matrices(12, 20, seed=60).values())
    for scale in (1e-12, 1e-7, 1e20, 1e37):
        check_bounds(accelerator, measure, f"scaled by {scale:g}", torch.stack(matrices) * scale)


@requires(
    level=1,
    must="polar takes stacks of 16 bits and returns their dtype, rounded once at the end.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_stack(accelerator: Accelerator, measure: Measure, dtype: str) -> None:
    stack = torch.stack(list(make_matrices(24, 33, seed=80).values())).to(dtype_named(dtype))
    for product in (torch.float32, dtype_named(dtype)):
        check_bounds(accelerator, measure, f"{dtype}, products in {product}", stack, JORDAN, product)


@requires(
    level=1,
    must="polar gives zeros for zeros, in a matrix, a row or a column, and for an empty stack an empty one.",
    needs=lambda product: f"dtypes:{product}",
)
@PRODUCT
def test_zeros(accelerator: Accelerator, product: str) -> None:
    check_zeros(accelerator, "polar", dtype_named(product))


@requires(level=1, must="A matrix that is not finite becomes nan by polar and spoils no other of its stack.")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_not_finite(accelerator: Accelerator, value: float) -> None:
    check_not_finite(accelerator, "polar", value, lambda healthy: bound_polar(healthy, JORDAN, torch.float32))


@requires(level=1, must="polar of no steps is the matrix divided by its norm, and coefficients are taken one a step.")
def test_steps(accelerator: Accelerator, measure: Measure) -> None:
    stack = torch.stack(list(make_matrices(10, 16, seed=90).values()))
    sets: tuple[Coefficients, ...] = ((), ((1.5, -0.5, 0.0),), ((1.5, -0.5, 0.0), (15 / 8, -10 / 8, 3 / 8)))
    for coefficients in sets:
        check_bounds(accelerator, measure, f"{len(coefficients)} steps", stack, coefficients)


@requires(
    level=1, must="polar makes the rows of a wide matrix of full rank orthonormal, with coefficients that converge."
)
def test_orthogonal(accelerator: Accelerator) -> None:
    """The property itself, for the set that converges: rows of full rank become orthonormal."""
    stack = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(11))
    with each_implementation(accelerator, "polar") as turns:
        for implementation, polar in turns:
            found = run_polar(accelerator, polar, stack, COEFFICIENTS["ten"])
            error = float((found @ found.mT - torch.eye(6)).abs().max())
            assert error < 2e-3, f"{implementation}: the rows are {error:.2g} away from orthonormal"
