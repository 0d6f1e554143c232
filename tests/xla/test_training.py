"""Training on XLA's CPU beyond what the conformance suite asks: programs of ranks, states that move between backends,
and the course of the loss beside the CPU backend's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import xla_training_workers as workers
from windlass.cli import app
from windlass.conformance.rank_pool import run_ranks

BOUND = 1e-4
"""Largest relative distance of the losses of one step. Rounding alone drives them apart by some 1e-6 in 50 steps."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_program_of_a_step_is_the_same_on_both_ranks(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_DEBUG", "1")
    for programs, unseen in run_ranks(workers.compare_every_program, 2, stage, 3, accelerator="xla", timeout=240):
        assert programs >= 2 * 3  # gradients, statistics, weights, in each of two steps
        assert unseen == 0


@pytest.mark.parametrize("stage", [1, 3])
def test_debug_mode_names_the_rank_whose_program_is_another(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_DEBUG", "1")
    for message in run_ranks(workers.differ_in_the_model, 2, stage, accelerator="xla", timeout=240):
        assert "the ranks are about to run different programs" in message
        assert "rank 0" in message
        assert "rank 1" in message


@pytest.mark.parametrize(("one", "other"), [("cpu", "xla"), ("xla", "cpu")])
@pytest.mark.parametrize(("stage", "later_stage", "ranks", "later_ranks"), [(1, 1, 1, 1), (2, 3, 2, 1), (3, 0, 1, 2)])
def test_a_state_saved_on_one_backend_loads_on_the_other(
    one: str, other: str, stage: int, later_stage: int, ranks: int, later_ranks: int, tmp_path: Path
) -> None:
    for worker, count, accelerator, *arguments in (
        (workers.save, ranks, one, stage, 2),
        (workers.load_and_train, later_ranks, other, later_stage, 2, 4),
    ):
        # Fresh, because a process that has trained on the CPU cannot train on XLA.
        run_ranks(worker, count, *arguments, str(tmp_path), accelerator=accelerator, timeout=240, fresh=True)


def test_a_process_that_has_trained_before_is_told_so() -> None:
    (message,) = run_ranks(workers.open_after_a_backward, 1, accelerator="xla", fresh=True)
    assert "a backward pass was made here before torch_xla was imported" in message


@pytest.mark.timeout(900)
def test_the_loss_takes_the_same_course_as_on_the_cpu(tmp_path: Path) -> None:
    """`windlass train`, nano, 50 steps, one seed, fp32."""
    courses = {}
    for backend in ("xla", "cpu"):  # XLA first: autograd takes no new devices after a backward pass
        folder = tmp_path / backend
        arguments = ["train", "--accelerator", backend, "--ranks", "1", "--model", "nano", "--steps", "50"]
        config = tmp_path / "config.json"
        config.write_text(json.dumps(_config()))
        result = CliRunner().invoke(app, [*arguments, "--seed", "0", "--out", str(folder), str(config)])
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        courses[backend] = [row["loss"] for row in rows]
    assert courses["cpu"][-1] < 0.8 * courses["cpu"][0]
    assert courses["xla"] == pytest.approx(courses["cpu"], rel=BOUND)


def _config() -> dict[str, object]:
    from windlass.recipe import default_config

    return default_config("nano", 50, 1)
