"""The coefficients of the kernel polar do what is published of them, and the reference does what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from windlass.accelerator.polar import COEFFICIENTS
from windlass.accelerator.reference import polar


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
