"""The files of a run, and the lines that rank 0 prints where there is no terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from windlass.progress import Lines, Nothing, show_progress
from windlass.run_folder import RunFolder, StepMetrics


def step_metrics(step: int, loss: float = 2.5) -> StepMetrics:
    return StepMetrics(step, loss, 0.5, 1e-3, 1000.0, 20.0, 1.0, skipped=False)


def test_metrics_are_whole_lines_of_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    assert folder.start(0) == []
    row = folder.add(step_metrics(1))
    folder.add(step_metrics(2))
    lines = folder.metrics.read_text().splitlines()
    assert json.loads(lines[0]) == row
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(0)
    assert folder.add(step_metrics(1, math.nan))["loss"] is None
    folder.write_json("summary.json", {"loss": math.inf, "rows": (1, math.nan), "inner": {"x": 0.5}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "loss": None,
        "rows": [1, None],
        "inner": {"x": 0.5},
    }


def test_a_resumed_run_keeps_the_steps_before_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(0)
    for step in range(1, 8):
        folder.add(step_metrics(step))
    with folder.metrics.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    assert [row["step"] for row in RunFolder(tmp_path).start(5)] == [1, 2, 3, 4, 5]
    assert len(folder.metrics.read_text().splitlines()) == 5
    assert RunFolder(tmp_path).start(0) == []


def test_a_checkpoint_is_there_once_it_is_committed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step5.tmp").mkdir(parents=True)
    assert not folder.has_checkpoint
    (folder.checkpoints / "latest").write_text("step5")
    assert folder.has_checkpoint


def test_lines_are_few_and_hold_the_first_and_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(first_step=0, steps=1000)
    for step in range(1, 1001):
        lines.update({"step": step, "loss": None if step == 50 else 2.5, "lr": 1e-3, "tokens_per_s": 12345.6})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 21
    assert printed[0].startswith("step    1/1000  loss 2.500  lr 1.00e-03  12,346 tokens/s  ")
    assert "loss not finite" in printed[1]
    assert printed[-1].startswith("step 1000/1000 ")
    assert printed[-1].endswith(" 0 s left")


def test_only_rank_0_shows_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(show_progress(1, 0, 10), Nothing)
    assert isinstance(show_progress(0, 0, 10), Lines)  # pytest's output is no terminal
    show_progress(3, 0, 10).update({"step": 1})
    assert capsys.readouterr().out == ""
