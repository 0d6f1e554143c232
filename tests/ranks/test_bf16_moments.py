"""Moments of 16 bits: half the bytes, the same bits on any number of ranks and at any stage, and training as good."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import bf16_moments_workers as workers
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training_workers import same_bits

STAGES = [0, 1, 2, 3]


@functools.cache
def trained_alone(uniform: bool) -> dict[str, Any]:
    (result,) = run_ranks(workers.train_exactly, 1, 0, uniform)
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("uniform", [False, True], ids=["free", "uniform"])
def test_bits_depend_on_neither_ranks_nor_stage(uniform: bool, ranks: int, stage: int) -> None:
    for result in run_ranks(workers.train_exactly, ranks, stage, uniform):
        assert same_bits(result, trained_alone(uniform))


def test_both_kinds_of_program_round_with_the_same_noise() -> None:
    """Their numbers differ in the last place of fp32, so that few moments are rounded in another way."""
    free, uniform = (trained_alone(kind)["moments"] for kind in (False, True))
    for name, moments in free.items():
        for key in ("exp_avg", "exp_avg_sq"):
            same = (moments[key] == uniform[name][key]).float().mean()
            assert same > 0.95, (name, key)


def test_captured_update_has_the_same_bits() -> None:
    (result,) = run_ranks(workers.train_exactly, 1, 1, False, {"capture_update": True})
    assert same_bits(result, trained_alone(False))


def test_seed_decides_the_rounding() -> None:
    (other,) = run_ranks(workers.train_exactly, 1, 0, False, {"seed": 7})
    moments, others = trained_alone(False)["moments"], other["moments"]
    assert any(not torch.equal(moments[name]["exp_avg"], others[name]["exp_avg"]) for name in moments)


def test_training_is_as_good() -> None:
    """A network learns: after forty steps both losses are well below the first one, and near each other."""
    narrow, wide = (run_ranks(workers.losses_of, 2, 2, states, 40)[0] for states in (True, False))
    assert narrow[0] == wide[0]
    assert max(narrow[-4:]) < 0.7 * narrow[0]
    for one, other in zip(narrow[-4:], wide[-4:], strict=True):
        assert one == pytest.approx(other, rel=0.05)


@pytest.mark.parametrize(("saving", "loading"), [((2, 1), (2, 1)), ((2, 3), (1, 0)), ((1, 0), (2, 2))])
def test_checkpoint_brings_everything_back(saving: tuple[int, int], loading: tuple[int, int], tmp_path: Path) -> None:
    """On as many ranks and at the same stage, what follows has the same bits too: noise goes on where it was."""
    before = run_ranks(workers.save_in_mid_run, saving[0], str(tmp_path), saving[1])[0]
    after = run_ranks(workers.continue_from, loading[0], str(tmp_path), loading[1])[0]
    assert same_bits(before["saved"], after["saved"])
    if saving == loading:
        assert same_bits(before["later"], after["later"])


@pytest.mark.parametrize("stage", STAGES)
def test_moments_cross_precisions(stage: int, tmp_path: Path) -> None:
    run_ranks(workers.moments_cross_precisions, 2, str(tmp_path), stage)
