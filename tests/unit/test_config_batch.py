"""Any two sizes of the batch triangle give the third, and a contradiction shows its arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from windlass.config import ConfigError, load_config


def triangle(train: Any, micro: Any, steps: Any) -> dict[str, Any]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {name: value for name, value in zip(names, (train, micro, steps), strict=True) if value is not None}


@pytest.mark.parametrize(
    ("train", "micro", "steps", "num_ranks", "default", "expected"),
    [
        (64, 4, 4, 4, None, (64, 4, 4)),
        (64, 4, None, 4, None, (64, 4, 4)),
        (64, None, 2, 4, None, (64, 8, 2)),
        (None, 3, 5, 2, None, (30, 3, 5)),
        (64, None, None, 4, 2, (64, 16, 1)),
        (None, 3, None, 4, 2, (12, 3, 1)),
        (None, None, 5, 4, None, (20, 1, 5)),
        (None, None, 5, 4, 2, (40, 2, 5)),
        (None, None, None, 4, None, (4, 1, 1)),
        (None, None, None, 4, 8, (32, 8, 1)),
        ("auto", 4, "auto", 2, None, (8, 4, 1)),
    ],
)
def test_batch_triangle_is_completed(
    train: Any, micro: Any, steps: Any, num_ranks: int, default: int | None, expected: tuple[int, int, int]
) -> None:
    config = load_config(triangle(train, micro, steps), num_ranks, default_micro_batch=default)
    sizes = (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps)
    assert sizes == expected
    assert sizes[0] == sizes[1] * sizes[2] * num_ranks


@pytest.mark.parametrize(
    ("source", "num_ranks"),
    [
        ({}, 1),
        ({"train_batch_size": 64}, 1),
        (triangle(64, 4, 4), 4),
        (triangle(64, 4, None), 1),
        ({"data_parallel_size": 8, "train_batch_size": 64}, 8),
    ],
)
def test_ranks_that_are_not_known_follow_from_the_file(source: dict[str, Any], num_ranks: int) -> None:
    config = load_config(source, None)
    assert config == load_config(source, num_ranks)
    assert config.num_ranks == num_ranks


def test_sizes_that_fit_no_number_of_ranks_are_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"= 4 x 4 x 4 = 64, set train_batch_size to 64"):
        load_config(triangle(65, 4, 4), None)


@pytest.mark.parametrize(
    ("train", "micro", "steps", "num_ranks", "sentence"),
    [
        (
            *(64, 4, 4, 2),
            "train_batch_size = 64 contradicts train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks "
            "= 4 x 4 x 2 = 32, set train_batch_size to 32 or remove one of the three keys",
        ),
        (
            *(65, None, 4, 2),
            "train_batch_size = 65 does not divide by gradient_accumulation_steps x ranks = 4 x 2 = 8, "
            "set it to 64 or 72, or change gradient_accumulation_steps",
        ),
        (
            *(10, 4, None, 4),
            "train_batch_size = 10 does not divide by train_micro_batch_size_per_gpu x ranks = 4 x 4 = 16, "
            "set it to 16, or change train_micro_batch_size_per_gpu",
        ),
        (
            *(7, None, None, 2),
            "train_batch_size = 7 does not divide by the number of ranks = 2, set it to 6 or 8, "
            "or change the number of ranks",
        ),
        (0, None, None, 2, "train_batch_size must be greater than 0, got 0"),
        (None, None, -1, 2, "gradient_accumulation_steps must be greater than 0, got -1"),
        (None, 1, None, 0, "the number of ranks must be at least 1, got 0"),
    ],
)
def test_batch_contradiction_shows_the_arithmetic(
    train: Any, micro: Any, steps: Any, num_ranks: int, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(triangle(train, micro, steps), num_ranks)
    assert str(caught.value) == f"config: {sentence}"
