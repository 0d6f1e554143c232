"""The built-in training job equals plain PyTorch on the same samples, for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipe_workers import losses_of, run_recipe, train_plainly
from windlass.config import load_config
from windlass.conformance.rank_pool import run_ranks
from windlass.models import SHAPES
from windlass.recipe import TrainOptions, default_config

STEPS, SEED = 4, 7
CONFIG: dict[str, Any] = {
    "train_batch_size": 12,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
}


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], float]:
    return train_plainly(CONFIG, "nano", STEPS, SEED)


@pytest.mark.parametrize(("num_ranks", "stage", "micro_steps"), [(1, 0, 1), (2, 2, 1), (3, 3, 2)])
def test_losses_are_those_of_plain_torch(
    tmp_path: Path, plain: tuple[list[float], float], num_ranks: int, stage: int, micro_steps: int
) -> None:
    zero = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": micro_steps}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | zero))
    options = TrainOptions(
        out=str(tmp_path / "run"), config=str(tmp_path / "config.json"), model="nano", steps=STEPS, seed=SEED
    )
    held_out = run_ranks(run_recipe, num_ranks, options)
    losses, expected = plain
    # fp32: the sums over samples run in another order, and four steps of AdamW spread that a little
    assert losses_of(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    assert held_out == pytest.approx([expected] * num_ranks, rel=1e-5)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("steps", [1, 5, 200, 10_000])
def test_default_configuration_is_valid(model: str, num_ranks: int, steps: int) -> None:
    config = load_config(default_config(model, steps, num_ranks, ["float32", "bfloat16"]), num_ranks)
    assert config.messages == ()
    assert config.bf16.enabled
    assert not load_config(default_config(model, steps, num_ranks, ["float32"]), num_ranks).bf16.enabled


def test_default_batch_is_the_same_on_ranks_that_divide_it() -> None:
    sizes = {n: load_config(default_config("tiny", 200, n), n).train_batch_size for n in (1, 2, 4, 8, 16)}
    assert set(sizes.values()) == {16}
