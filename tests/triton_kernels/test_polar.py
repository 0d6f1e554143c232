"""Newton-Schulz with symmetric products, by the bounds of the schemas, on matrices that tests elsewhere leave small."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from windlass.accelerator.polar import COEFFICIENTS, Coefficients, plan_restarts
from windlass.backends.triton.launch import interpreting
from windlass.backends.triton.normalize import normalize
from windlass.backends.triton.polar import KERNELS, NewtonSchulz
from windlass.backends.triton.polar import _multiply as multiply
from windlass.conformance.polar_cases import PolarBounds, bound_polar, bound_polar_gram, make_matrices

DEVICE = (None if interpreting() else torch.accelerator.current_accelerator()) or torch.device("cpu")
ALWAYS = NewtonSchulz(symmetric_from=1)
LIBRARY = NewtonSchulz(symmetric_from=None)
JORDAN, EXPRESS = COEFFICIENTS["jordan"], COEFFICIENTS["polar_express"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_stack(rows: int, columns: int) -> Tensor:
    matrices = make_matrices(rows, columns, seed=rows)
    return torch.stack([matrices[name] for name in ("1/k", "a third of the rank")])


def assert_within(found: Tensor, bounds: PolarBounds) -> None:
    errors = np.sqrt(((found.cpu().double().numpy() - bounds.wanted) ** 2).sum((-2, -1)))
    assert (errors <= bounds.allowed).all(), f"off by {errors}, allowed is {bounds.allowed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 72), (130, 70), (128, 192)], ids=str)
def test_standard_form(shape: tuple[int, int], dtype: torch.dtype) -> None:
    stack = make_stack(*shape)
    found = ALWAYS.polar(stack.to(DEVICE), JORDAN, product_dtype=dtype)
    assert found.shape == stack.shape
    assert found.dtype is stack.dtype
    assert found.is_contiguous()
    assert_within(found, bound_polar(stack, JORDAN, dtype))


@pytest.mark.parametrize("shape", [(40, 72), (130, 70)], ids=str)
def test_standard_form_of_large_matrices_copies_none(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library copies what it is to add to a product of the size of X."""
    added: list[bool] = []

    def look(left: Tensor, right: Tensor, **more: Any) -> Tensor:
        added.append(more.get("added") is not None)
        return multiply(left, right, **more)

    monkeypatch.setattr("windlass.backends.triton.polar._multiply", look)
    ALWAYS.polar(make_stack(*shape).to(DEVICE), JORDAN[:2], product_dtype=torch.bfloat16)
    assert added == [False, False]


@pytest.mark.parametrize("shape", [(40, 72), (130, 70), (128, 192)], ids=str)
@pytest.mark.parametrize("coefficients", [JORDAN, EXPRESS], ids=["jordan", "polar_express"])
def test_gram_form(shape: tuple[int, int], coefficients: Coefficients) -> None:
    stack = make_stack(*shape)
    restarts = plan_restarts(coefficients, torch.finfo(torch.float16).eps)
    found = ALWAYS.polar_gram(stack.to(DEVICE), coefficients, product_dtype=torch.float16)
    assert_within(found, bound_polar_gram(stack, coefficients, torch.float16, restarts))
    assert found.is_contiguous()


@pytest.mark.parametrize("restarts", [(), (0, 2), (1, 2, 3, 4)], ids=str)
def test_gram_form_starts_anew_where_it_is_told_to(restarts: tuple[int, ...]) -> None:
    stack = make_stack(40, 72)
    for form in (ALWAYS, LIBRARY):
        found = form.polar_gram(stack.to(DEVICE), JORDAN, restarts=restarts)
        assert_within(found, bound_polar_gram(stack, JORDAN, torch.float32, restarts))


@pytest.mark.parametrize("form", ["polar", "polar_gram"])
def test_matrices_that_are_not_finite_spoil_no_other(form: str) -> None:
    stack = torch.randn((3, 70, 70), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    clean = getattr(ALWAYS, form)(stack, JORDAN[:2], product_dtype=torch.float16)
    stack[1, 69, 3] = math.inf
    found = getattr(ALWAYS, form)(stack, JORDAN[:2], product_dtype=torch.float16)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("form", ["polar", "polar_gram"])
def test_nothing_and_no_steps(form: str) -> None:
    stack = make_stack(5, 9).to(DEVICE)
    assert getattr(ALWAYS, form)(stack[:0], JORDAN).shape == (0, 5, 9)
    torch.testing.assert_close(getattr(ALWAYS, form)(stack, ()), normalize(stack, torch.float32), rtol=0, atol=0)


def test_what_is_given_stays_as_it_is_even_where_it_is_strided() -> None:
    stack = make_stack(30, 20).to(DEVICE)
    before = stack.clone()
    turned = LIBRARY.polar(stack.mT, JORDAN)
    assert torch.equal(stack, before)
    torch.testing.assert_close(turned.mT, LIBRARY.polar(stack, JORDAN), rtol=0, atol=1e-4)


def test_settings_of_torch_are_used_for_exact_products_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul
    seen: list[tuple[object, ...]] = []
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "fp32_precision")

    def read() -> tuple[object, ...]:
        return tuple(getattr(settings, name) for name in names)

    def look(x: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append((*read(), torch.is_autocast_enabled(x.device.type)))
        return normalize(x, dtype)

    def fail(x: Tensor, dtype: torch.dtype) -> Tensor:
        raise ZeroDivisionError

    stack = make_stack(4, 6).to(DEVICE)
    monkeypatch.setattr("windlass.backends.triton.polar.normalize", look)
    precision = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        before = read()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            result = LIBRARY.polar(stack, JORDAN)
        assert result.dtype is torch.float32
        assert seen == [(False, False, "ieee", False)]
        assert read() == before
        monkeypatch.setattr("windlass.backends.triton.polar.normalize", fail)
        with pytest.raises(ZeroDivisionError):
            LIBRARY.polar(stack, JORDAN)
        assert read() == before
    finally:
        settings.fp32_precision = precision


def test_what_does_not_fit_is_refused() -> None:
    stack = torch.ones(1, 4, 4, device=DEVICE)
    for kernel in KERNELS:
        for wrong, dtype in ((stack[0], torch.float32), (stack.double(), torch.float32), (stack, torch.float64)):
            with pytest.raises(ValueError, match=r"wanted \[b, n, m\]"):
                kernel.function(wrong, JORDAN, product_dtype=dtype)
    with pytest.raises(ValueError, match="wanted float32 or float16"):
        ALWAYS.polar_gram(stack, JORDAN, product_dtype=torch.bfloat16)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, out: torch.dtype) -> None:
    stack = torch.randn((3, 70, 91), generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    stack[1] = 0
    found = normalize(stack, out)
    exact = stack.double() / stack.double().square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
    error = (found.double() - exact).abs()
    smallest = 2.0**-25 if out is torch.float16 else 0.0
    single = torch.finfo(torch.float32).eps
    assert (error <= (torch.finfo(out).eps / 2 + 2 * single) * exact.abs() + smallest).all()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-12, 1e20, 3.4e38])
def test_norms_of_any_size(size: float) -> None:
    """Elements of one size, which is everything or nothing beside the rest, in a matrix of several blocks."""
    stack = torch.zeros(2, 100, 150)
    stack[0, :, ::7] = size
    stack[1] = 1e-30
    stack[1, 99, 149] = size
    exact = stack.double() / stack.double().square().sum((1, 2), keepdim=True).sqrt()
    found = normalize(stack.to(DEVICE), torch.float32).cpu().double()
    assert float((found - exact).abs().max()) < 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_norms_of_what_is_not_finite(value: float) -> None:
    for place in ((0, 0), (99, 149)):
        stack = torch.ones(2, 100, 150)
        stack[1, *place] = value
        found = normalize(stack.to(DEVICE), torch.float32).cpu()
        assert found[1].isnan().all()
        torch.testing.assert_close(found[0], torch.full((100, 150), 15_000**-0.5))
