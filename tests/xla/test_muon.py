"""Muon on XLA's CPU: one program on all ranks, and none more when numbers change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import uniform_muon_workers as workers
from windlass.cli import app
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import distance

BOUND = 1e-5
"""Of the distance of weights and momenta from those of the CPU backend after five updates, by norm."""
PLANS = [(0, "fp32"), (1, "fp32"), (3, "fp32")]


@pytest.mark.timeout(900)
def test_training_is_that_of_the_cpu_and_nothing_is_compiled_later() -> None:
    """Also when the learning rate changes and a step is skipped."""
    wanted = run_ranks(workers.train_plans, 2, PLANS, "fp32", accelerator="cpu", timeout=240, fresh=True)[0]
    for found in run_ranks(workers.train_plans, 2, PLANS, "fp32", accelerator="xla", timeout=600, fresh=True):
        for (state, compiled), (same, _) in zip(found, wanted, strict=True):
            worst = distance(state, same)
            assert max(worst.values()) < BOUND, worst
            assert compiled[2:] == compiled[1:2] * 4


@pytest.mark.timeout(900)
def test_ranks_run_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """They compare theirs at each collective. The second program is that of all later steps."""
    monkeypatch.setenv("WINDLASS_DEBUG", "1")
    losses = run_ranks(workers.train_twice, 2, 3, accelerator="xla", timeout=600)
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]


@pytest.mark.timeout(900)
def test_windlass_train_learns(tmp_path: Path) -> None:
    """`windlass train`, nano, 20 steps."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "Muon", "params": {"lr": 0.01}}}))
    folder = tmp_path / "run"
    arguments = ["train", "--accelerator", "xla", "--ranks", "1", "--model", "nano", "--steps", "20"]
    result = CliRunner().invoke(app, [*arguments, "--seed", "0", "--out", str(folder), str(config)])
    assert result.exit_code == 0, result.output
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
