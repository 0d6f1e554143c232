"""A simulated device that compiles wants the same program from all ranks: small programs, each difference in turn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sim_uniform_workers as workers
from windlass.conformance.rank_pool import run_ranks

SECONDS = 8.0  # well below the timeout: nothing waits for it


@pytest.fixture(autouse=True)
def _uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "uniform=true,delay_ms=0.1")
    monkeypatch.setenv("WINDLASS_TIMEOUT", "30")


def run(worker: Any, num_ranks: int, *args: Any) -> list[Any]:
    return run_ranks(worker, num_ranks, *args, accelerator="sim")


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (
            workers.offset,
            "rank 0: aten.neg.default('weights'[0:128] float32 %1); "
            "rank 1: aten.neg.default('weights'[128:256] float32 %1);",
        ),
        (workers.shape, "rank 0: aten.mul.Tensor(float32[1, 1], 'weights'[0:512] float32 %1); rank 1: aten.mul.Tensor("
                        "float32[2, 1], 'weights'[0:512] float32 %1);"),
        (
            workers.scalar,
            "rank 0: aten.mul.Tensor('weights'[0:512] float32 %1, 1.0); "
            "rank 1: aten.mul.Tensor('weights'[0:512] float32 %1, 2.0);",
        ),
        (
            workers.operation_more,
            "rank 0: none, the program is over; rank 1: aten.neg.default('weights'[0:512] float32 %1);",
        ),
        (workers.read_of_a_value, "rank 0: none, the program is over; rank 1: aten.sum.default("),
        (
            workers.part_of_a_collective,
            "rank 0: all_gather 'weights' of 1024 bytes of float32 in group 'world' of 2(outputs=['weights'[0:512] "
            "float32 %1], inputs=['weights'[0:256] float32 %1]); rank 1: all_gather 'weights' of 1024 bytes of float32 "
            "in group 'world' of 2(outputs=['weights'[0:512] float32 %1], inputs=['weights'[256:512] float32 %1]);",
        ),
    ],
)  # fmt: skip
def test_rank_that_differs_is_told_on_every_rank(step: workers.Step, told: str) -> None:
    for name, text, seconds in run(workers.run_step, 2, step):
        assert (name, seconds < SECONDS) == ("ProgramMismatch", True), text
        assert f"operation 2 since the boundary before is, on {told}" in text


def test_message_on_the_page_is_raised() -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulated-accelerator.md").read_text()
    shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    assert {text for _, text, _ in run(workers.run_step, 2, workers.offset)} == {" ".join(shown[1].split())}


def test_constant_that_was_read_from_the_device_is_a_constant() -> None:
    for name, text, _ in run(workers.run_step, 2, workers.constant_from_a_read):
        assert name == "ProgramMismatch"
        assert "operation 5 since the boundary before is, on rank 0: aten.mul.Tensor(" in text
        assert "%1, 1024.0); rank 1: " in text
        assert "%1, 1025.0); keep" in text


def test_ranks_that_agree_are_named_together() -> None:
    for name, text, _ in run(workers.run_step, 3, workers.branch):
        assert name == "ProgramMismatch"
        assert "on ranks 0 and 2: aten.cos.default(" in text
        assert "; rank 1: aten.exp.default(" in text


@pytest.mark.parametrize("step", [workers.collective_more, workers.collective_more_that_is_waited_for])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_collective_that_one_rank_makes_alone_meets_the_boundary(step: workers.Step, num_ranks: int) -> None:
    for name, text, seconds in run(workers.run_step, num_ranks, step):
        assert (name, seconds < SECONDS) == ("CollectiveMismatch", True), text
        assert "all_gather 'boundary'" in text
        assert "all_reduce 'norm' (call 1 of its group)" in text


@pytest.mark.parametrize("rate_as_tensor", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_program_with_data_of_each_rank(num_ranks: int, rate_as_tensor: bool) -> None:
    steps = 4
    wanted = torch.ones(4 * num_ranks)
    for step in range(steps):
        wanted -= sum(rank + step for rank in range(num_ranks)) * 0.5**step
    for weights, counts in run(workers.train, num_ranks, steps, rate_as_tensor):
        assert weights == wanted.tolist()
        # The first step fills the weights besides. The read comes after the backward and what updates the weights, so
        # it cuts nothing off, unless something follows it.
        assert counts == {"compiled": 2 if rate_as_tensor else steps, "executed": steps}
