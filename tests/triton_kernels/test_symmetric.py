"""Half a product is a whole one, of any number of tiles, read by rows or by columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.backends.triton.launch import interpreting
from windlass.backends.triton.symmetric import GROUP, _tile, symmetric_product

DEVICE = (None if interpreting() else torch.accelerator.current_accelerator()) or torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@triton.jit
def _write_tiles(rows: tl.tensor, columns: tl.tensor, tiles: tl.tensor, GROUP: tl.constexpr) -> None:
    place = tl.program_id(0)
    row, column = _tile(place, tiles, GROUP)
    tl.store(rows + place, row)
    tl.store(columns + place, column)


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(found: Tensor, exact: Tensor, sizes: Tensor) -> None:
    """Half a unit of the dtype, and 32 of fp32 of the sum of the sizes of the terms."""
    unit, single = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps
    allowed = unit / 2 * exact.abs() + 32 * single * sizes
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 16, 19])
def test_each_tile_on_and_below_the_diagonal_is_made_once(tiles: int) -> None:
    programs = tiles * (tiles + 1) // 2
    rows, columns = (torch.full((programs,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _write_tiles[(programs,)](rows, columns, tiles, GROUP=GROUP)
    found = sorted(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == [(row, column) for row in range(tiles) for column in range(row + 1)]


@triton.jit
def _write_some_tiles(
    places: tl.tensor, rows: tl.tensor, columns: tl.tensor, tiles: tl.tensor, GROUP: tl.constexpr
) -> None:
    at = tl.program_id(0)
    row, column = _tile(tl.load(places + at), tiles, GROUP)
    tl.store(rows + at, row)
    tl.store(columns + at, column)


@pytest.mark.parametrize("first", [8, 96, 2888, 2896, 30_000, 46_328])
def test_tiles_are_found_however_many_there_are(first: int) -> None:
    """Around the first row of a group, where a root that is off by one would be noticed."""
    before = first * (first + 1) // 2
    places = torch.tensor([before - 1, before, before + 1], dtype=torch.int32, device=DEVICE)
    rows, columns = torch.zeros_like(places), torch.zeros_like(places)
    _write_some_tiles[(3,)](places, rows, columns, 46_340, GROUP=GROUP)
    assert rows.tolist() == [first - 1, first, first + 1]
    assert columns.tolist() == [first - 1, 0, 0]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 192, 128), (1, 320, 64)], ids=str)
def test_product_with_its_transpose(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = make(*shape, dtype=dtype)
    found, exact = symmetric_product(x, x), x.double() @ x.double().mT
    assert_close(found, exact, x.double().abs() @ x.double().abs().mT)
    assert torch.equal(found, found.mT)
    assert found.dtype is dtype


@DTYPES
def test_columns_give_what_rows_give(dtype: torch.dtype) -> None:
    x = make(1, 192, 128, dtype=dtype)
    turned = x.mT.contiguous().mT
    np.testing.assert_allclose(
        symmetric_product(turned, turned).double().cpu(), symmetric_product(x, x).double().cpu(),
        rtol=torch.finfo(dtype).eps, atol=1e-4,
    )  # fmt: skip


@DTYPES
def test_product_of_matrices_that_commute_and_a_third(dtype: torch.dtype) -> None:
    x = make(2, 192, 192, dtype=torch.float32) / 192**0.5
    left = (x @ x.mT).to(dtype)
    left = torch.where(torch.ones_like(left).tril().bool(), left, left.mT)  # to the bit, whatever a library makes of it
    right = left  # commutes with itself
    added = (left.float() + torch.eye(192, device=DEVICE)).to(dtype)
    found = symmetric_product(left, right, alpha=-1.5, beta=0.75, added=added)
    exact = -1.5 * left.double() @ right.double() + 0.75 * added.double()
    assert_close(found, exact, 1.5 * left.double().abs() @ right.double().abs() + 0.75 * added.double().abs())
    assert torch.equal(found, found.mT)


def test_half_that_is_made_is_the_lower_one() -> None:
    """The product of two that do not commute: its lower half, twice."""
    left, right = (make(1, 192, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    found = symmetric_product(left, right)
    lower = (left.double() @ right.double().mT).tril()
    exact = lower + lower.tril(-1).mT
    assert_close(
        found, exact, left.double().abs() @ right.double().abs().mT + right.double().abs() @ left.double().abs().mT
    )


def test_matrices_of_a_stack_do_not_meet() -> None:
    x = make(3, 64, 64, dtype=torch.float16)
    x[1] = float("nan")
    found = symmetric_product(x, x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], symmetric_product(x[[0, 2]], x[[0, 2]]))


def test_no_matrices() -> None:
    x = make(0, 64, 64, dtype=torch.bfloat16)
    assert symmetric_product(x, x).shape == (0, 64, 64)


def test_what_does_not_fit_is_refused() -> None:
    x, y = make(1, 64, 128, dtype=torch.bfloat16), make(1, 64, 128, dtype=torch.float16)
    for wrong in (x[0], x[:, :40], x.double(), make(1, 64, 256, dtype=torch.bfloat16)[:, :, ::2], x[:, :, :0]):
        with pytest.raises(ValueError, match="got left as"):
            symmetric_product(wrong, wrong)
    with pytest.raises(ValueError, match="got right as"):
        symmetric_product(x, y)
    with pytest.raises(ValueError, match="got added as"):
        symmetric_product(x, x, added=x)
    with pytest.raises(ValueError, match="got added as"):
        symmetric_product(x.mT, x.mT, added=make(1, 128, 128, dtype=torch.bfloat16))
