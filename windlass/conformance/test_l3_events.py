"""Level 3: what happens around a step. Evaluation, exceptions, random numbers, and checkpoints that load elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from windlass.conformance import training_workers
from windlass.conformance.cells import STAGES, Run
from windlass.conformance.requirements import requires
from windlass.conformance.training import assert_equals_oracle


@pytest.mark.parametrize("stage", STAGES)
@requires(level=3, must="Evaluation between steps and micro-batches changes nothing in the training.", needs="ranks:2")
def test_evaluation_leaves_no_trace(run: Run, stage: int) -> None:
    run(training_workers.evaluate_between_steps, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
@requires(
    level=3,
    must="Where a fetch needs no partner and ranks may run different programs, they may evaluate different numbers of "
    "batches.",
    needs=("one_sided", "ranks:2"),
    without="uniform_program",
)
def test_ranks_may_evaluate_unevenly(run: Run, stage: int) -> None:
    run(training_workers.evaluate_between_steps, 2, stage, True)


@pytest.mark.parametrize("stage", STAGES)
@requires(level=3, must="After an exception in a forward pass, training goes on as before it.", needs="ranks:2")
def test_training_goes_on_after_an_exception(run: Run, stage: int) -> None:
    run(training_workers.raise_in_forward_then_train, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
@requires(level=3, must="All backward passes between two steps count.", needs="ranks:2")
def test_several_backwards_per_step(run: Run, stage: int) -> None:
    run(training_workers.several_backwards_per_step, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
@requires(level=3, must="The module's state_dict is complete between any two steps.", needs="ranks:2")
def test_state_dict_is_complete(run: Run, stage: int) -> None:
    run(training_workers.state_dict_in_mid_training, 2, stage)


@requires(level=3, must="Plans that differ between ranks are refused on every rank.", needs="ranks:2")
def test_different_plans_are_refused(run: Run) -> None:
    run(training_workers.refuse_different_plans, 2)


@pytest.mark.parametrize("stage", STAGES)
@requires(
    level=3,
    must="The seed of each rank determines its dropout, and a restored random state gives the same draws.",
    needs="ranks:2",
)
def test_seeds_rule_dropout(run: Run, stage: int) -> None:
    run(training_workers.seeds_rule_dropout, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
@requires(level=3, must="Recomputed activations draw the dropout masks that the forward pass drew.", needs="ranks:2")
def test_recomputation_draws_the_same_mask(run: Run, stage: int) -> None:
    run(training_workers.recomputation_draws_the_same_mask, 2, stage)


@pytest.mark.parametrize(
    ("written", "read"),
    [((2, 1), (2, 3)), ((2, 3), (1, 0)), ((1, 2), (4, 3)), ((4, 3), (2, 2))],
    ids=lambda pair: f"{pair[0]}ranks-stage{pair[1]}",
)
@requires(
    level=3,
    must="A checkpoint loads to the bit at any stage on any number of ranks, and training goes on like plain PyTorch.",
    needs=lambda written, read: f"ranks:{max(written[0], read[0])}",
)
def test_checkpoint_loads_anywhere(run: Run, tmp_path: Path, written: tuple[int, int], read: tuple[int, int]) -> None:
    saved = run(training_workers.save_after_three_steps, written[0], str(tmp_path), written[1])
    loaded = run(training_workers.load_and_continue, read[0], str(tmp_path), read[1])
    for rank in loaded:
        assert training_workers.same_bits(saved[0]["saved"], rank["saved"])
        assert rank["later"]["facts"] == saved[0]["later"]["facts"]
        assert_equals_oracle(rank["later"]["weights"], "Tied", 5)
    for before, after in zip(saved, loaded, strict=False):  # of the ranks that both had
        assert torch.equal(before["draws"], after["draws"])


@pytest.mark.parametrize("read", STAGES)
@pytest.mark.parametrize("written", [1, 3])
@requires(
    level=3,
    must="A training continued from a checkpoint at the same stage ends with the bits of one that was not interrupted, "
    "and at another stage too unless that is compiled as a program of its own.",
    needs=("ordered_reduction", "ranks:2"),
    without=lambda written, read: None if written == read else "lazy",
)
def test_resumed_equals_uninterrupted(run: Run, tmp_path: Path, written: int, read: int) -> None:
    saved = run(training_workers.save_after_three_steps, 2, str(tmp_path), written)
    loaded = run(training_workers.load_and_continue, 2, str(tmp_path), read)
    for before, after in zip(saved, loaded, strict=True):
        assert training_workers.same_bits(before["later"], after["later"])
