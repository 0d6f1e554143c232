"""Orthogonalisation on the processor: strips of symmetric products, two steps on one Gram matrix, and equal bits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.polar import COEFFICIENTS, plan_restarts
from windlass.backends.cpu import products
from windlass.backends.cpu.polar import plan_stretches, polar, polar_gram
from windlass.backends.cpu.polar_passes import normalize
from windlass.backends.cpu.products import LEAST, STRIP, choose_products
from windlass.backends.cpu.transposition import mirror
from windlass.conformance.kernel_cases import Doubles
from windlass.conformance.polar_cases import PolarBounds, bound_polar, bound_polar_gram, with_spectrum

JORDAN = COEFFICIENTS["jordan"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD = (391, 601)  # rows in four strips, the last of 7 rows; long enough for two steps on one Gram matrix


def assert_within(found: Tensor, bounds: PolarBounds, product: torch.dtype) -> None:
    doubles: Doubles = found.double().numpy()
    errors = np.sqrt(((doubles - bounds.wanted) ** 2).sum((-2, -1)))
    assert (errors <= bounds.allowed).all(), errors / bounds.allowed
    if product != torch.float32:  # whose units are finer than `largest` is known
        largest = bounds.largest * (1 + 4 * torch.finfo(product).eps)
        assert np.linalg.norm(doubles, 2, (-2, -1)).max() <= largest


@functools.cache
def falling(rows: int, columns: int) -> Tensor:
    """A stack of one matrix of spectrum 1/k."""
    return with_spectrum(1 / np.arange(1.0, rows + 1), rows, columns)[None]


@functools.cache
def hard_matrices(rows: int, columns: int) -> Tensor:
    """Spectra that fall, that have a gap where rounding could close it, and a flat one."""
    places = np.arange(1.0, rows + 1)
    spectra = (1 / places**2, np.where(places < 8, 1, 0.003))
    flat = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return torch.stack([falling(rows, columns)[0], *(with_spectrum(one, rows, columns) for one in spectra), flat])


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_joined_steps_are_within_the_bounds_of_the_standard_form(name: str) -> None:
    stack, coefficients = hard_matrices(256, 400), COEFFICIENTS[name]
    assert len(plan_stretches(256, 400, coefficients, torch.bfloat16)) == (len(coefficients) + 1) // 2
    bounds = bound_polar(stack, coefficients, torch.bfloat16)
    assert_within(polar(stack, coefficients, product_dtype=torch.bfloat16), bounds, torch.bfloat16)


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_strips_are_within_the_bounds_wide_and_tall(product: torch.dtype) -> None:
    stack = falling(*ODD)
    bounds = bound_polar(stack, JORDAN, product)
    assert_within(polar(stack, JORDAN, product_dtype=product), bounds, product)
    turned = polar(stack.mT.contiguous(), JORDAN, product_dtype=product).mT
    assert_within(turned, bounds, product)


def test_strips_of_the_gram_form_are_within_its_bounds() -> None:
    stack, eps = falling(*ODD), torch.finfo(torch.float32).eps
    bounds = bound_polar_gram(stack, JORDAN, torch.float32, plan_restarts(JORDAN, eps))
    assert_within(polar_gram(stack, JORDAN), bounds, torch.float32)


def test_a_processor_without_fast_bfloat16_rounds_factors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    assert choose_products(torch.bfloat16).dtype == torch.float32
    stack = falling(*ODD)
    found = polar(stack, JORDAN, product_dtype=torch.bfloat16)
    assert_within(found, bound_polar(stack, JORDAN, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("product", DTYPES)
@pytest.mark.parametrize("shape", [(20, 33), (75, 50), (391, 601)], ids=str)
def test_bits_depend_on_nothing_but_the_matrix(shape: tuple[int, int], product: torch.dtype) -> None:
    """Alone, among others, and at an address that no vector register likes."""
    random = torch.Generator().manual_seed(5)
    numel = shape[0] * shape[1]
    memory = torch.randn(3 * numel + 1, generator=random).to(torch.bfloat16)
    alone = memory[1 + numel : 1 + 2 * numel].clone().view(1, *shape)
    wanted = polar(alone, JORDAN, product_dtype=product)
    among = polar(memory[1:].view(3, *shape), JORDAN, product_dtype=product)
    assert torch.equal(among[1:2], wanted)
    strided = alone.mT.contiguous().mT
    assert torch.equal(polar(strided, JORDAN, product_dtype=product), wanted)
    assert not torch.equal(among[0], among[1])


def test_which_steps_are_joined() -> None:
    assert plan_stretches(512, 2048, JORDAN, torch.bfloat16) == (0, 2, 4)
    assert plan_stretches(2048, 512, JORDAN, torch.bfloat16) == (0, 2, 4)
    every = (1, 2, 3, 4)
    assert plan_stretches(512, 640, JORDAN, torch.bfloat16) == every  # not long enough to pay
    assert plan_stretches(64, 2048, JORDAN, torch.bfloat16) == every  # so few rows that errors are not spread
    steep = ((2.0, -1.0, 0.0), (9.0, -1.0, 0.0), (9.0, -1.0, 0.0), (2.0, -1.0, 0.0))
    assert plan_stretches(512, 2048, steep, torch.bfloat16) == (0, 2)
    assert plan_stretches(512, 2048, steep[1:], torch.bfloat16) == (0, 1)  # 81 squared would lift a unit to 51
    assert plan_stretches(512, 2048, (), torch.bfloat16) == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 31, 128, 129, 391])
def test_mirror_fills_what_lies_below_the_diagonal_blocks(rows: int, dtype: torch.dtype) -> None:
    known = torch.randn(rows, rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = known.triu() + known.triu(1).mT
    block = torch.arange(rows) // STRIP
    given = torch.where(block[:, None] > block[None, :], torch.full_like(wanted, torch.nan), wanted)
    mirror(given, STRIP)
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("product", DTYPES)
def test_symmetric_products_are_right_in_both_triangles(product: torch.dtype) -> None:
    way, rows = choose_products(product), LEAST + 5
    x = (torch.randn(rows, 70, generator=torch.Generator().manual_seed(2)) / 8).to(product).to(way.dtype)
    gram, blend = torch.empty(rows, rows, dtype=way.dtype), torch.empty(rows, rows, dtype=way.dtype)
    eps = torch.finfo(way.dtype).eps
    way.multiply_symmetric(x, x.mT, gram)
    torch.testing.assert_close(gram.double(), x.double() @ x.double().mT, rtol=eps, atol=70 * 2**-23)
    way.add_symmetric(gram, 0.5, -0.25, blend)
    factor = gram.to(product).double()
    wanted = 0.5 * gram.double() - 0.25 * factor @ factor
    torch.testing.assert_close(blend.double(), wanted, rtol=eps, atol=rows * 2**-20)
    for each in (gram, blend):
        assert torch.equal(each[STRIP:, :STRIP], each[:STRIP, STRIP:].mT)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_has_the_range_of_float32(dtype: torch.dtype, scale: float) -> None:
    matrix = (torch.randn(9, 31, generator=torch.Generator().manual_seed(3)) * scale).to(dtype)
    if not matrix.isfinite().all() or not matrix.any():
        matrix = torch.randn(9, 31, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = torch.empty(9, 31)
    normalize(matrix, found)
    wanted = matrix.double() / matrix.double().norm()
    torch.testing.assert_close(found.double(), wanted, rtol=2**-23, atol=0)


def test_a_stack_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kernel 'polar' got a stack of float32\[3, 4\] on cpu, wanted three"):
        polar(torch.zeros(3, 4), JORDAN)
    with pytest.raises(ValueError, match=r"^kernel 'polar_gram' got a stack of float64"):
        polar_gram(torch.zeros(1, 3, 4, dtype=torch.float64), JORDAN)
    with pytest.raises(ValueError, match=r"^kernel 'polar_gram' got products in torch\.bfloat16"):
        polar_gram(torch.zeros(1, 3, 4), JORDAN, product_dtype=torch.bfloat16)
