"""The coefficients of the kernel polar do what is published of them, and the reference does what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from windlass.accelerator.polar import COEFFICIENTS, choose_form, gram_flops, plan_restarts, standard_flops
from windlass.accelerator.reference import polar, polar_gram
from windlass.conformance.polar_cases import bound_polar_gram, make_matrices


def follow(name: str, lowest: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What becomes of singular values between `lowest` and 1."""
    values = np.linspace(lowest, 1, 100_001)
    for a, b, c in COEFFICIENTS[name]:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize(
    ("name", "steps", "lowest", "least", "most"),
    [
        ("jordan", 5, 0.01, 0.67, 1.21),
        ("you", 5, 0.01, 0.85, 1.15),
        ("polar_express", 5, 0.01, 0.86, 1.13),
        ("ten", 10, 0.001, 0.995, 1.003),
    ],
)
def test_singular_values_come_near_one(name: str, steps: int, lowest: float, least: float, most: float) -> None:
    assert len(COEFFICIENTS[name]) == steps
    values = follow(name, lowest)
    assert least <= values.min()
    assert values.max() <= most


def test_polar_express_is_safe_for_what_rounding_lifts_above_one() -> None:
    value = 1.01
    for a, b, c in COEFFICIENTS["polar_express"]:
        value = a * value + b * value**3 + c * value**5
    assert 0.8 < value < 1.2


@pytest.mark.parametrize("shape", [(2, 20, 50), (2, 50, 20)])
def test_reference_is_the_factor_of_the_singular_value_decomposition(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(stack.double(), full_matrices=False)
    torch.testing.assert_close(polar(stack, COEFFICIENTS["ten"]).double(), left @ right, rtol=0, atol=1e-3)


def test_result_is_a_contiguous_tensor_of_its_own() -> None:
    for shape in ((2, 3, 5), (2, 5, 3), (0, 3, 5), (2, 0, 5)):
        stack = torch.ones(shape)
        result = polar(stack, ((1.0, 0.0, 0.0),))
        assert result.shape == shape
        assert result.is_contiguous()
        if stack.numel():
            assert result.data_ptr() != stack.data_ptr()


def test_coefficients_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        COEFFICIENTS["jordan"] = ()  # type: ignore[index]


HALF, SINGLE = torch.finfo(torch.float16).eps, torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("name", "rounding", "wanted"),
    [
        ("jordan", HALF, (3,)),
        ("you", HALF, (2,)),
        ("polar_express", HALF, (2,)),
        ("ten", HALF, (3, 6, 9)),
        ("jordan", SINGLE, ()),
        ("you", SINGLE, ()),
        ("polar_express", SINGLE, ()),
        ("ten", SINGLE, (6,)),
    ],
)
def test_gram_form_starts_anew_before_noise_becomes_a_singular_value(
    name: str, rounding: float, wanted: tuple[int, ...]
) -> None:
    assert plan_restarts(COEFFICIENTS[name], rounding) == wanted


@pytest.mark.parametrize("name", ["you", "polar_express", "ten"])
def test_without_restarts_fp16_is_outside_the_bounds(name: str) -> None:
    """So the suite would notice an implementation that forgets them."""
    stack = torch.stack(list(make_matrices(40, 72).values()))
    coefficients = COEFFICIENTS[name]
    bounds = bound_polar_gram(stack, coefficients, torch.float16, plan_restarts(coefficients, HALF))
    found = polar_gram(stack, coefficients, product_dtype=torch.float16, restarts=()).double().numpy()
    errors = np.sqrt(((found - bounds.wanted) ** 2).sum((-2, -1)))
    assert not (errors <= 1.5 * bounds.allowed).all()


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_both_forms_give_the_same_for_well_conditioned_matrices(name: str) -> None:
    """The steps are the same; noise grows only where singular values are small."""
    stack = torch.randn((2, 6, 60), generator=torch.Generator().manual_seed(3))
    standard = polar(stack, COEFFICIENTS[name])
    for restarts in ((), (1,), (0, 2, 4)):
        found = polar_gram(stack, COEFFICIENTS[name], restarts=restarts)
        torch.testing.assert_close(found, standard, rtol=0, atol=2e-5)


def test_gram_form_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match=r"products in torch\.bfloat16, wanted float32 or float16"):
        polar_gram(torch.ones(1, 2, 2), COEFFICIENTS["jordan"], product_dtype=torch.bfloat16)


def test_operations_of_five_steps() -> None:
    """20 n^2 m + 10 n^3, and 15 n^2 m + 5 n^3 with symmetric products, whichever side is the small one."""
    assert standard_flops(10, 30, 5) == 20 * 3000 + 10 * 1000
    assert standard_flops(30, 10, 5) == 20 * 3000 + 10 * 1000
    assert standard_flops(10, 30, 5, symmetric=True) == 15 * 3000 + 5 * 1000
    assert standard_flops(10, 30, 0) == 0


def test_operations_of_the_gram_form() -> None:
    """One restart in five steps: 8 n^2 m + 28 n^3, and 6 n^2 m + 14 n^3 with symmetric products."""
    five = COEFFICIENTS["jordan"]
    for restarts in ((2,), (3,), (0, 3), (3, 5, 7)):
        assert gram_flops(10, 30, five, restarts) == 8 * 3000 + 28 * 1000
        assert gram_flops(30, 10, five, restarts, symmetric=True) == 6 * 3000 + 14 * 1000
    assert gram_flops(10, 30, five, ()) == 4 * 3000 + 34 * 1000
    assert gram_flops(10, 30, five, (1, 2, 3, 4)) == 20 * 3000 + 10 * 1000  # which is the standard form
    assert gram_flops(10, 30, (), ()) == 0


def test_gram_form_is_chosen_where_it_takes_fewer_operations() -> None:
    five = COEFFICIENTS["jordan"]
    half = ("float32", "float16", "bfloat16")

    def choose(columns: int, symmetric: bool, dtypes: tuple[str, ...] = half) -> str:
        return choose_form(1000, columns, five, symmetric=symmetric, product_dtypes=dtypes)

    assert choose(1000, symmetric=True) == "standard"
    assert choose(1100, symmetric=True) == "gram"
    assert choose(1500, symmetric=False) == "standard"
    assert choose(1501, symmetric=False) == "gram"
    assert choose_form(4000, 1000, five, symmetric=False, product_dtypes=half) == "gram"
    assert choose(4000, symmetric=True, dtypes=("float32", "bfloat16")) == "standard"
    assert choose(4000, symmetric=True, dtypes=("float32",)) == "gram"
