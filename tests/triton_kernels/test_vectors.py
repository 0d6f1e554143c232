"""square_sum and scale_cast in Triton: sums against exact ones, casts to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from windlass.backends.triton.launch import launch
from windlass.backends.triton.vectors import (
    CAST_BLOCK,
    FINISH,
    FINISH_BLOCK,
    SUM_BLOCK,
    SUM_COLUMNS,
    scale_cast,
    square_sum,
)
from windlass.conformance.kernel_cases import DTYPES, ONE, equal_bits, sum_squares, values_around

COUNTS = (1, 2, 31, SUM_COLUMNS - 1, SUM_COLUMNS, SUM_COLUMNS + 1, SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 100_003)
SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        5.9e-8,
        -6e-5,
        1.2e-38,
        1.0,
        65519.99,
        65520.0,
        -1e30,
        3.4e38,
        math.inf,
        -math.inf,
        math.nan,
    ]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_sum_is_right_for_every_length(dtype: torch.dtype, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    total, bad = square_sum(values, torch.tensor(0.3)).tolist()
    assert total == pytest.approx(sum_squares(values, 0.3), rel=1e-6)
    assert bad == 0


def test_equal_values_do_not_drift() -> None:
    values = torch.full((40 * SUM_BLOCK + 1,), 0.1)
    assert square_sum(values, ONE)[0].item() == pytest.approx(sum_squares(values, 1.0), rel=3e-7)


def test_many_blocks_are_added_as_few_are() -> None:
    """A billion elements have more blocks than fit into one round of the last program."""
    count = 2 * FINISH_BLOCK + 1234
    sums = torch.rand(count, generator=torch.Generator().manual_seed(0))
    flags = torch.zeros(count, dtype=torch.int32)

    def finish() -> list[float]:
        result = torch.empty(2)
        launch(FINISH, (1,), result.device, result=result, sums=sums, flags=flags, count=count)
        found: list[float] = result.tolist()
        return found

    assert finish() == [np.float32(math.fsum(sums.tolist())), 0.0]
    sums[-1], flags[-1] = math.nan, 1
    total, bad = finish()
    assert math.isnan(total)
    assert bad == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("place", [0, SUM_BLOCK, 2 * SUM_BLOCK + 6])
def test_a_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    values = torch.ones(2 * SUM_BLOCK + 7, dtype=dtype)
    values[place] = value
    for scale in (1.0, 0.0):
        assert square_sum(values, torch.tensor(scale))[1].item() == 1


def test_an_overflow_is_no_value_that_is_not_finite() -> None:
    values = torch.full((SUM_BLOCK + 5,), 1e30)
    assert square_sum(values, ONE).tolist() == [math.inf, 0.0]
    assert square_sum(torch.full((7,), 1e19), ONE).tolist() == [math.inf, 0.0]  # only their sum is too large
    assert square_sum(values, torch.tensor(1e-30))[0].item() == pytest.approx(SUM_BLOCK + 5, rel=1e-6)
    assert square_sum(values, torch.tensor(math.nan))[1].item() == 0


def test_sum_of_a_slice_at_any_start_has_the_bits_of_a_copy() -> None:
    values = torch.randn(20_011, generator=torch.Generator().manual_seed(3))
    for begin, end in ((1, 20_000), (3, 9000), (8, 8 + SUM_BLOCK), (20_010, 20_011)):
        part = values[begin:end]
        assert torch.equal(square_sum(part, ONE), square_sum(part.clone(), ONE))


def test_sum_of_nothing() -> None:
    assert square_sum(torch.empty(0), ONE).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("destination", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3, -(2.0**-20), 1e30])
def test_casts_are_rounded_once(destination: torch.dtype, source: torch.dtype, scale: float) -> None:
    narrow = torch.float16 if destination is torch.float32 else destination
    some = values_around(narrow)[:: 97 if source is torch.float32 else 61]
    values = torch.cat([SPECIAL, some]).to(source)
    factor = torch.tensor(scale)
    found = torch.full(values.shape, 7.0, dtype=destination)
    assert scale_cast(found, values, factor) is found
    with np.errstate(all="ignore"):
        product = torch.from_numpy(values.float().numpy() * factor.numpy())
    assert equal_bits(found, product.to(destination))


@pytest.mark.parametrize("count", [1, 31, CAST_BLOCK - 1, CAST_BLOCK, CAST_BLOCK + 1])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_casts_of_slices_touch_nothing_else(count: int, start: int) -> None:
    source = torch.randn(count + 9, generator=torch.Generator().manual_seed(count))
    found = torch.full((count + 9,), 7.0, dtype=torch.bfloat16)
    scale_cast(found[start : start + count], source[start : start + count], ONE)
    assert torch.equal(found[start : start + count], source[start : start + count].bfloat16())
    assert (found[:start] == 7).all()
    assert (found[start + count :] == 7).all()


def test_a_vector_may_be_scaled_where_it_is() -> None:
    values = torch.arange(3000.0)
    assert scale_cast(values, values, torch.tensor(2.0)).tolist() == [2.0 * i for i in range(3000)]
    assert scale_cast(values[:0], values[:0], ONE).numel() == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kernel 'square_sum' got values as contiguous int64\[2\], wanted"):
        square_sum(torch.tensor([1, 2]), ONE)
    with pytest.raises(ValueError, match=r"^kernel 'square_sum' got scale as contiguous float32\[2\], wanted"):
        square_sum(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"^kernel 'scale_cast' got source as contiguous float32\[3\], wanted"):
        scale_cast(torch.ones(2), torch.ones(3), ONE)
    with pytest.raises(ValueError, match=r"^kernel 'scale_cast' got destination as strided float32\[2\], wanted"):
        scale_cast(torch.ones(4)[::2], torch.ones(2), ONE)
