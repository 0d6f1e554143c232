"""Level 3: training with Muon on this device equals plain PyTorch on the whole batch, at every stage."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from windlass.conformance import muon_training
from windlass.conformance.cells import STAGES, Run
from windlass.conformance.rank_pool import RanksFailed
from windlass.conformance.requirements import requires
from windlass.conformance.training import distance

RANKS = (1, 2, 4)
BOUND = 1e-5
"""How far weights and momenta may be from the oracle in double precision, relative to their size, if plain PyTorch in
fp32 is not as far itself: five steps of Newton-Schulz lift rounding errors by 485."""

_answers: dict[tuple[int, tuple[int, ...]], list[dict[int, Any]] | RanksFailed] = {}


def every_rank(ranks: int) -> str:
    return f"ranks:{ranks}"


def in_order(ranks: int) -> tuple[str, str]:
    return "ordered_reduction", f"ranks:{ranks}"


@functools.cache
def oracle(dtype: torch.dtype) -> Any:
    return muon_training.train_plainly(dtype)


def trained(run: Run, ranks: int, stage: int) -> list[dict[str, Any]]:
    """By rank, what a training came to: of all stages in one call, or of this one alone if that failed."""
    for stages in (STAGES, (stage,)):
        if (ranks, stages) not in _answers:
            try:
                _answers[ranks, stages] = run(muon_training.train_stages, ranks, list(stages), timeout=60.0)
            except RanksFailed as failure:
                _answers[ranks, stages] = failure
        answer = _answers[ranks, stages]
        if not isinstance(answer, RanksFailed):
            return [one[stage] for one in answer]
    assert isinstance(answer, RanksFailed)
    raise answer


def assert_near(found: dict[str, Any], plain: dict[str, Any], exact: dict[str, Any]) -> None:
    for kind in ("weights", "momenta"):
        noise, error = distance(plain[kind], exact[kind]), distance(found[kind], exact[kind])
        wrong = {name: far for name, far in error.items() if far > max(BOUND, 3 * noise[name])}
        assert wrong == {}, f"{kind}: {wrong}"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="Weights and momenta trained with Muon are within 1e-5 of plain PyTorch's on the whole batch, or as near to "
    "the exact result as those are.",
    needs=every_rank,
    since="1.1",
)
def test_muon_equals_plain_pytorch(run: Run, ranks: int, stage: int) -> None:
    found = trained(run, ranks, stage)[0]
    assert_near(found, oracle(torch.float32), oracle(torch.float64))
    assert found["norms"] == pytest.approx(oracle(torch.float64)["norms"], rel=1e-5)


@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="Unless each stage is compiled as a program with roundings of its own, all stages train the same bits with "
    "Muon, if a matrix has the same bits of the polar kernels in every stack.",
    needs=in_order,
    without="lazy",
    since="1.1",
)
def test_stages_of_muon_agree_to_the_bit(run: Run, ranks: int) -> None:
    first, *others = (trained(run, ranks, stage)[0] for stage in STAGES)
    for stage, other in zip(STAGES[1:], others, strict=True):
        if not first["alike"]:
            assert_near(other, first, oracle(torch.float64))
            continue
        for kind in ("weights", "momenta"):
            unlike = [name for name, one in first[kind].items() if not torch.equal(one, other[kind][name])]
            assert unlike == [], f"{kind} of stages 0 and {stage}"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [ranks for ranks in RANKS if ranks > 1])
@requires(level=3, must="Every rank ends a training with Muon with the same bits.", needs=every_rank, since="1.1")
def test_ranks_of_muon_agree_to_the_bit(run: Run, ranks: int, stage: int) -> None:
    first, *others = trained(run, ranks, stage)
    for other in others:
        for kind in ("weights", "momenta"):
            assert [name for name, one in first[kind].items() if not torch.equal(one, other[kind][name])] == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="A gradient that is not finite on one rank skips Muon's step on all, and leaves weights and momenta as they "
    "were.",
    needs=every_rank,
    since="1.1",
)
def test_muon_skips_what_is_not_finite(run: Run, ranks: int, stage: int) -> None:
    assert [rank["moved"] for rank in trained(run, ranks, stage)] == [[]] * ranks


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3, must="When an engine that trained with Muon is closed, no byte is left.", needs=every_rank, since="1.1"
)
def test_closing_gives_muons_memory_back(run: Run, ranks: int, stage: int) -> None:
    assert [rank["left"] for rank in trained(run, ranks, stage)] == [0] * ranks
