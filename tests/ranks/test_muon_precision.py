"""Muon with momentum in 16 bits, and with an fp16 model that overflows."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import muon_invariance_workers as workers
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]


@functools.cache
def narrow(ranks: int) -> list[dict[int, dict[str, Tensor]]]:
    return run_ranks(workers.narrow_momenta, ranks, STAGES)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_narrow_momentum_has_bits_that_depend_on_neither_ranks_nor_stage(ranks: int) -> None:
    wanted = narrow(1)[0][0]
    for rank in narrow(ranks):
        for stage in STAGES:
            assert [name for name in wanted if not torch.equal(rank[stage][name], wanted[name])] == []


def test_narrow_momentum_is_rounded_to_a_neighbour_and_right_in_the_mean() -> None:
    wide, rounded = narrow(1)[0][-1], narrow(1)[0][-2]
    errors = []
    for name in wide:
        if name.startswith("momentum"):
            unit = torch.ldexp(
                torch.ones_like(wide[name]), torch.frexp(wide[name]).exponent - 8
            )  # of bf16, in the last place
            assert torch.equal(rounded[name], rounded[name].bfloat16().float())
            errors.append(((rounded[name] - wide[name]) / unit).flatten())
            assert float(errors[-1].abs().max()) < 1
    together = torch.cat(errors)
    assert float((together != 0).float().mean()) > 0.1
    assert abs(float(together.mean())) < 0.05, together.mean()


def test_seed_decides_the_rounding() -> None:
    one, other = narrow(1)[0][-2], narrow(1)[0][-3]
    assert not any(torch.equal(one[name], other[name]) for name in one if name.startswith("momentum"))


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_on_one_rank_changes_no_bit(stage: int) -> None:
    assert run_ranks(workers.overflow_once, 2, stage) == [[], []]
