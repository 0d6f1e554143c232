"""Level 0: the dtypes that memory takes, and those whose matrix products the device is made for."""

from __future__ import annotations

import pytest
import torch

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import (
    FLOATS,
    INTEGERS,
    allocated,
    assert_holds,
    bring,
    dtype_named,
    random_bits,
    used,
)
from windlass.conformance.refusals import refused
from windlass.conformance.requirements import requires

FLOAT = pytest.mark.parametrize("dtype", FLOATS)
PRODUCT = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@requires(level=0, must="Memory takes uint8, int32 and int64 and copies them to the bit.")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(accelerator: Accelerator, dtype: str) -> None:
    check_copied(accelerator, dtype_named(dtype))


@requires(
    level=0,
    must="Memory takes every floating dtype that is declared and copies it to the bit, the payload of a nan included.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@FLOAT
def test_floats(accelerator: Accelerator, dtype: str) -> None:
    check_copied(accelerator, dtype_named(dtype))


@requires(level=0, must="Memory takes float64 where it is declared and copies it to the bit.", needs="float64")
def test_doubles(accelerator: Accelerator) -> None:
    check_copied(accelerator, torch.float64)


@requires(level=0, must="Where float64 is declared the device computes in double precision.", needs="float64")
def test_arithmetic_of_doubles(accelerator: Accelerator) -> None:
    host = torch.tensor([1.0 + 2.0**-45, 1e300, 2.0**-1000], dtype=torch.float64)
    with allocated(accelerator, host) as tensor:
        assert_holds(accelerator, tensor * 3, host * 3)


def check_copied(accelerator: Accelerator, dtype: torch.dtype) -> None:
    for count in (0, 1, 7, 70_001):
        values, before = random_bits(count, dtype, seed=count), used(accelerator)
        with allocated(accelerator, values) as source, allocated(accelerator, torch.zeros_like(values)) as destination:
            assert source.dtype == dtype
            assert used(accelerator) == before + 2 * count * dtype.itemsize
            accelerator.memory.copy(destination, source).wait()
            assert_holds(accelerator, destination, values)


@requires(
    level=0,
    must="A floating dtype that is not declared is refused by memory, with what to use instead.",
    without=lambda dtype: f"dtypes:{dtype}",
)
@FLOAT
def test_undeclared_float_is_refused(accelerator: Accelerator, dtype: str) -> None:
    check_dtype_refused(accelerator, dtype)


@requires(level=0, must="Where float64 is not declared, memory refuses it with what to use instead.", without="float64")
def test_undeclared_double_is_refused(accelerator: Accelerator) -> None:
    check_dtype_refused(accelerator, "float64")


@requires(level=0, must="A dtype that nobody can declare is refused by memory, with what to use instead.")
def test_complex_is_refused(accelerator: Accelerator) -> None:
    check_dtype_refused(accelerator, "complex64")


def check_dtype_refused(accelerator: Accelerator, dtype: str) -> None:
    before = used(accelerator)
    with refused(dtype):
        accelerator.memory.empty((4,), dtype_named(dtype))
    assert used(accelerator) == before
    accelerator.memory.release(accelerator.memory.empty((4,), torch.float32))  # the control


@requires(
    level=0, must="float32 is declared, float64 only by its own name, and every declared name is a floating dtype."
)
def test_declared_names(accelerator: Accelerator) -> None:
    capabilities = accelerator.capabilities
    assert "float32" in capabilities.dtypes
    for names in (capabilities.dtypes, capabilities.matmul_dtypes):
        assert isinstance(names, tuple)
        assert len(set(names)) == len(names)
        assert "float64" not in names
        assert all(dtype_named(name).is_floating_point for name in names)
    assert set(capabilities.matmul_dtypes) <= set(capabilities.dtypes)


@requires(
    level=0,
    must="A matrix product in a declared dtype is accumulated in float32 or wider and then rounded.",
    needs=lambda dtype: f"matmul_dtypes:{dtype}",
)
@PRODUCT
def test_product(accelerator: Accelerator, dtype: str) -> None:
    # It may be right where it is not declared, and slow: nobody declares too little.
    accelerator.capabilities.require(f"matmul_dtypes:{dtype}", "multiply in float32 instead")
    check_product(accelerator, dtype_named(dtype), dtype_named(dtype))


@requires(
    level=0,
    must="Products of a dtype that is not in matmul_dtypes are refused by require(), and right in float32 instead.",
    needs=lambda dtype: f"dtypes:{dtype}",
    without=lambda dtype: f"matmul_dtypes:{dtype}",
)
@PRODUCT
def test_product_in_float32_instead(accelerator: Accelerator, dtype: str) -> None:
    with refused(f"matmul_dtypes:{dtype}"):
        accelerator.capabilities.require(f"matmul_dtypes:{dtype}", "multiply in float32 instead")
    check_product(accelerator, dtype_named(dtype), torch.float32)


def check_product(accelerator: Accelerator, stored: torch.dtype, multiplied: torch.dtype) -> None:
    """|computed - exact| <= (inner * eps32 + 2 * eps) * |A| |B|: the roundings of the sum and those of the result."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 1, 1), (5, 16, 3), (64, 64, 64), (33, 257, 65)):
        left = torch.randn(rows, inner, generator=generator).to(stored)
        right = torch.randn(inner, columns, generator=generator).to(stored)
        exact, sizes = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        product = bring(accelerator, left).to(multiplied) @ bring(accelerator, right).to(multiplied)
        assert product.dtype == multiplied
        error = (accelerator.to_host(product).double() - exact).abs()
        allowed = (inner * torch.finfo(torch.float32).eps + 2 * torch.finfo(multiplied).eps) * sizes
        worst = float((error / allowed).max())
        assert worst <= 1, f"{rows} x {inner} x {columns}: off by {worst:.2f} of what is allowed"
