"""The loss plot: a real picture, with what was measured in it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from windlass.report import draw_loss, save_loss_plot, smooth


def rows(count: int) -> list[dict[str, float | None]]:
    return [{"step": step, "loss": 2 + 3 / step, "lr": 1e-3 * step / count} for step in range(1, count + 1)]


def test_plot_is_a_picture_with_the_colours_of_its_curves(tmp_path: Path) -> None:
    save_loss_plot(tmp_path / "loss.png", rows(50), title="tiny on two ranks", held_out=2.3)
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (720, 1152)
    shown = {tuple(colour) for colour in (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    assert {(0xA9, 0xC4, 0xDE), (0x1F, 0x5F, 0x99), (0xC2, 0x57, 0x1A)} <= shown


def test_panels_hold_what_was_measured() -> None:
    figure = Figure()
    draw_loss(figure, rows(50), title="a run", held_out=2.3)
    above, below = figure.axes
    loss, smoothed, held_out = above.get_lines()
    np.testing.assert_allclose(np.asarray(loss.get_ydata()), [2 + 3 / step for step in range(1, 51)])
    assert len(np.asarray(smoothed.get_ydata())) == 50
    assert held_out.get_xydata().tolist() == [[50, 2.3]]  # type: ignore[union-attr]
    assert above.get_title(loc="left") == "a run"
    np.testing.assert_allclose(np.asarray(below.get_lines()[0].get_ydata()), [1e-3 * s / 50 for s in range(1, 51)])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_of_few_steps_can_be_drawn(tmp_path: Path, count: int) -> None:
    save_loss_plot(tmp_path / "loss.png", rows(count), title="short", held_out=2.0 if count else None)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    broken = rows(30)
    broken[10]["loss"] = None
    figure = Figure()
    draw_loss(figure, broken, title="broken")
    drawn = np.asarray(figure.axes[0].get_lines()[0].get_ydata(), dtype=float)
    assert np.isnan(drawn).nonzero()[0].tolist() == [10]
    assert all(math.isfinite(value) for value in smooth(drawn.tolist()))


def test_smoothing_keeps_a_constant_and_calms_noise() -> None:
    assert smooth([3.0] * 40) == pytest.approx([3.0] * 40)
    noise = [3.0 + (-1) ** step for step in range(400)]
    assert max(abs(value - 3) for value in smooth(noise)) < 0.3
    assert smooth([]) == []
