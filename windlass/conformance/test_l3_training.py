"""Level 3: training on this device equals plain PyTorch on the whole batch, at every stage, and is what was planned."""

from __future__ import annotations

import functools

import pytest
import torch

from windlass.conformance import training_workers
from windlass.conformance.cells import ACCUMULATIONS, STAGES, STEPS, Run, trained_cell
from windlass.conformance.requirements import requires
from windlass.conformance.training import assert_equals_oracle, train_oracle

RANKS = (1, 2, 4)


def every_rank(ranks: int) -> str:
    return f"ranks:{ranks}"


def in_order(ranks: int) -> tuple[str, str]:
    return "ordered_reduction", f"ranks:{ranks}"


@functools.cache
def norms_of_oracle() -> list[float]:
    return train_oracle("Network", STEPS)[1]


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="Weights trained in float32 are within 1e-6 of plain PyTorch's on the whole batch, or as near to the exact "
    "result as those are.",
    needs=every_rank,
)
def test_weights_equal_plain_pytorch(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    assert_equals_oracle(trained_cell(run, ranks, stage, accumulation)[0]["state"], "Network", STEPS)


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="The gradient norm of every step is the norm of the mean gradient, as plain PyTorch has it.",
    needs=every_rank,
)
def test_norms_equal_plain_pytorch(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    assert trained_cell(run, ranks, stage, accumulation)[0]["norms"] == pytest.approx(norms_of_oracle(), rel=1e-5)


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [ranks for ranks in RANKS if ranks > 1])
@requires(level=3, must="Every rank ends a training with the same bits.", needs=every_rank)
def test_ranks_agree_to_the_bit(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    first, *others = trained_cell(run, ranks, stage, accumulation)
    for other in others:
        assert other["norms"] == first["norms"]
        assert [name for name, value in first["state"].items() if not torch.equal(value, other["state"][name])] == []


@pytest.mark.parametrize(
    ("one", "other", "accumulation"),
    [(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 1, 4), (2, 3, 4)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="Unless each stage is compiled as a program with roundings of its own, stages that reduce the same terms end "
    "with the same bits: all of them without accumulation, with it 0 and 1, and 2 and 3.",
    needs=in_order,
    without="lazy",
)
def test_stages_agree_to_the_bit(run: Run, ranks: int, one: int, other: int, accumulation: int) -> None:
    first, second = (trained_cell(run, ranks, stage, accumulation)[0] for stage in (one, other))
    assert first["norms"] == second["norms"]
    assert [name for name, value in first["state"].items() if not torch.equal(value, second["state"][name])] == []


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="The counters show the collectives of a step, their calls and received bytes by kind and tag, as planned.",
    needs=every_rank,
)
def test_traffic_is_what_was_planned(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    for rank in trained_cell(run, ranks, stage, accumulation):
        assert rank["measured"] == rank["predicted"]


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(level=3, must="An optimizer step reads from the device once, and the counters show it.", needs=every_rank)
def test_a_step_reads_once(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    assert [rank["host_reads"] for rank in trained_cell(run, ranks, stage, accumulation)] == [1] * ranks


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(
    level=3,
    must="Between steps the memory statistics show, tag by tag, the bytes that the plan predicts.",
    needs=every_rank,
)
def test_memory_is_what_was_planned(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    for rank in trained_cell(run, ranks, stage, accumulation):
        assert rank["by_tag"] == rank["persistent"]


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@requires(level=3, must="When an engine is closed, no byte that it allocated is left.", needs=every_rank)
def test_closing_gives_all_memory_back(run: Run, ranks: int, stage: int, accumulation: int) -> None:
    assert [rank["left"] for rank in trained_cell(run, ranks, stage, accumulation)] == [0] * ranks


@pytest.mark.parametrize("limit", [0.0, 0.1])
@pytest.mark.parametrize("stage", STAGES)
@requires(
    level=3,
    must="Gradients are clipped by their global norm as plain PyTorch clips them, or not at all where that is asked.",
    needs="ranks:2",
)
def test_clipping(run: Run, stage: int, limit: float) -> None:
    run(training_workers.clip_and_compare, 2, stage, limit, STEPS)
