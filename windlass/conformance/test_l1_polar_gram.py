"""Level 1: polar_gram, which takes the steps of polar on the Gram matrix: the same results, with noise of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS, Coefficients, plan_restarts
from windlass.conformance.allocations import bring, dtype_named
from windlass.conformance.kernel_runs import each_implementation
from windlass.conformance.plugin import Measure
from windlass.conformance.polar_cases import PolarBounds, bound_polar_gram, make_matrices
from windlass.conformance.polar_runs import JORDAN, check_not_finite, check_polar, check_zeros
from windlass.conformance.requirements import requires

SET = pytest.mark.parametrize("coefficients", COEFFICIENTS)
PRODUCT = pytest.mark.parametrize("product", ["float32", "float16"])


def check_bounds(
    accelerator: Accelerator,
    measure: Measure,
    case: str,
    stack: Tensor,
    coefficients: Coefficients = JORDAN,
    product_dtype: torch.dtype = torch.float32,
) -> None:
    """Compare every implementation with the tolerance of the schema, matrix by matrix, and note the worst."""
    restarts = plan_restarts(coefficients, torch.finfo(product_dtype).eps)
    bounds = bound_polar_gram(stack, coefficients, product_dtype, restarts)
    check_polar(accelerator, measure, "polar_gram", case, stack, bounds, coefficients, product_dtype)


@requires(
    level=1,
    must="polar_gram sends each singular value through its polynomials, whatever the spectrum and the rank.",
    needs=lambda product: f"dtypes:{product}",
    since="1.1",
)
@SET
@PRODUCT
def test_bounds(accelerator: Accelerator, measure: Measure, coefficients: str, product: str) -> None:
    for shape in ((40, 72), (72, 40))[: 2 if coefficients == "jordan" else 1]:
        stack = torch.stack(list(make_matrices(*shape).values()))
        case = f"{shape[0]} x {shape[1]}, {coefficients}, products in {product}"
        check_bounds(accelerator, measure, case, stack, COEFFICIENTS[coefficients], dtype_named(product))


@requires(level=1, must="polar_gram is within its bounds for one row, one column, and square matrices.", since="1.1")
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (7, 7), (50, 3)], ids=str)
def test_small_shapes(accelerator: Accelerator, measure: Measure, shape: tuple[int, int]) -> None:
    stack = torch.stack(list(make_matrices(*shape, seed=20).values()))
    check_bounds(accelerator, measure, f"{shape[0]} x {shape[1]}", stack, COEFFICIENTS["polar_express"])


@requires(
    level=1,
    must="polar_gram of matrices so large that a device may take another way is within its bounds.",
    needs="dtypes:float16",
    since="1.1",
)
@pytest.mark.parametrize("shape", [(272, 330), (330, 256)], ids=str)
def test_large_matrices(accelerator: Accelerator, measure: Measure, shape: tuple[int, int]) -> None:
    stack = make_matrices(*shape, seed=50)["1/k"][None]
    case = f"{shape[0]} x {shape[1]}"
    check_bounds(accelerator, measure, case, stack, COEFFICIENTS["polar_express"][:3], torch.float16)


@requires(level=1, must="polar_gram does not depend on the scale of a matrix.", since="1.1")
def test_scale(accelerator: Accelerator, measure: Measure) -> None:
    matrices = torch.stack(list(make_matrices(12, 20, seed=60).values()))
    for scale in (1e-12, 1e37):
        check_bounds(accelerator, measure, f"scaled by {scale:g}", matrices * scale)


@requires(
    level=1,
    must="polar_gram takes stacks of 16 bits and returns their dtype.",
    needs=lambda dtype: (f"dtypes:{dtype}", "dtypes:float16"),
    since="1.1",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_stack(accelerator: Accelerator, measure: Measure, dtype: str) -> None:
    stack = torch.stack(list(make_matrices(24, 33, seed=80).values())).to(dtype_named(dtype))
    for product in (torch.float32, torch.float16):
        check_bounds(accelerator, measure, f"{dtype}, products in {product}", stack, JORDAN, product)


@requires(
    level=1,
    must="polar_gram makes its Gram matrix anew before the steps it is told to, which changes the noise alone.",
    since="1.1",
)
def test_restarts(accelerator: Accelerator) -> None:
    stack = torch.stack(list(make_matrices(20, 36, seed=70).values()))
    on_device = bring(accelerator, stack)
    for restarts in ((), (2,), (1, 2, 3, 4)):
        bounds = bound_polar_gram(stack, JORDAN, torch.float32, restarts)
        with each_implementation(accelerator, "polar_gram") as turns:
            for implementation, polar_gram in turns:
                found = accelerator.to_host(polar_gram(on_device, JORDAN, restarts=restarts)).double().numpy()
                errors = np.sqrt(((found - bounds.wanted) ** 2).sum((-2, -1)))
                assert (errors <= bounds.allowed).all(), f"{implementation}, {restarts}: off by {errors}"


@requires(
    level=1,
    must="polar_gram gives zeros for zeros, in a matrix, a row or a column, and for an empty stack an empty one.",
    since="1.1",
)
def test_zeros(accelerator: Accelerator) -> None:
    check_zeros(accelerator, "polar_gram", torch.float32)


@requires(
    level=1, must="A matrix that is not finite becomes nan by polar_gram and spoils no other of its stack.", since="1.1"
)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_not_finite(accelerator: Accelerator, value: float) -> None:
    def find_bounds(healthy: Tensor) -> PolarBounds:
        return bound_polar_gram(healthy, JORDAN, torch.float32, ())

    check_not_finite(accelerator, "polar_gram", value, find_bounds)
