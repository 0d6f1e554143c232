"""Level 1: polar, whose result is known by singular values: each goes through the polynomials of the steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS, Coefficients
from windlass.conformance.allocations import assert_same_bits, dtype_named
from windlass.conformance.kernel_runs import each_implementation, run_polar
from windlass.conformance.plugin import Measure
from windlass.conformance.polar_cases import bound_polar, make_matrices
from windlass.conformance.requirements import requires

SET = pytest.mark.parametrize("coefficients", COEFFICIENTS)
PRODUCT = pytest.mark.parametrize("product", ["float32", "bfloat16", "float16"])
JORDAN = COEFFICIENTS["jordan"]


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
    with each_implementation(accelerator, "polar") as turns:
        for implementation, polar in turns:
            found = run_polar(accelerator, polar, stack, coefficients, product_dtype).double().numpy()
            errors = np.sqrt(((found - bounds.wanted) ** 2).sum((-2, -1)))
            shares = np.where(errors == 0, 0, errors / np.maximum(bounds.allowed, 1e-300))
            measure(
                "kernel", name="polar", implementation=implementation, case=case, error=float(shares.max()),
                bound=1.0, unit="of the allowed error",
            )  # fmt: skip
            assert (shares <= 1).all(), f"{implementation}, {case}: shares of what is allowed are {shares}"
            largest = float(np.linalg.norm(found, 2, (-2, -1)).max())
            assert largest <= bounds.largest * (1 + 4 * unit), f"{implementation}, {case}: {largest} is too large"


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
    stack = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(7))
    stack[0], stack[1, 4:], stack[2, :, 11:] = 0, 0, 0
    empty = torch.zeros(0, 9, 14)
    with each_implementation(accelerator, "polar") as turns:
        for implementation, polar in turns:
            found = run_polar(accelerator, polar, stack, JORDAN, dtype_named(product))
            for part in (found[0], found[1, 4:], found[2, :, 11:]):
                assert torch.equal(part, torch.zeros_like(part)), f"{implementation}: zeros do not stay zeros"
            norms = found[1:].square().sum((-2, -1)).sqrt()
            assert (norms > 1).all(), f"{implementation}: what is beside the zeros has norms {norms.tolist()}"
            assert_same_bits(run_polar(accelerator, polar, empty, JORDAN, dtype_named(product)), empty, implementation)


@requires(level=1, must="A matrix that is not finite becomes nan by polar and spoils no other of its stack.")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_not_finite(accelerator: Accelerator, value: float) -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(8))
    stack[1, 7, 3] = value
    healthy = stack[[0, 2]]
    bounds = bound_polar(healthy, JORDAN, torch.float32)
    with each_implementation(accelerator, "polar") as turns:
        for implementation, polar in turns:
            found = run_polar(accelerator, polar, stack, JORDAN)
            assert found[1].isnan().all(), f"{implementation}: a matrix with {value} is not nan everywhere"
            errors = np.sqrt(((found[[0, 2]].double().numpy() - bounds.wanted) ** 2).sum((-2, -1)))
            assert (errors <= bounds.allowed).all(), f"{implementation}: its neighbours are off by {errors}"


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
