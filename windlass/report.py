"""The picture of a training run: loss over steps, and the learning rate that went with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _LIGHT, _DARK, _MARK, _GRID = "#30343b", "#a9c4de", "#1f5f99", "#c2571a", "#e3e6ea"


def save_loss_plot(
    path: Path,  # of the PNG
    rows: Sequence[Mapping[str, Any]],  # of metrics.jsonl: step, loss, lr; a loss that is not finite is None
    *,
    title: str,
    held_out: float | None = None,  # the loss on held-out text after the last step
) -> None:
    """Draw the loss of each step, its smoothed course and the held-out loss, above the learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    draw_loss(figure, rows, title=title, held_out=held_out)
    figure.savefig(path)


def draw_loss(figure: Figure, rows: Sequence[Mapping[str, Any]], *, title: str, held_out: float | None = None) -> None:
    """Put both panels on an empty figure."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    steps = [row["step"] for row in rows]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    above.plot(steps, losses, color=_LIGHT, linewidth=1.1, label="loss of the step")
    if len(rows) >= 10:
        above.plot(steps, smooth(losses), color=_DARK, linewidth=2, label="smoothed")
    if held_out is not None and steps:
        above.plot(
            [steps[-1]], [held_out], marker="D", markersize=6, linestyle="none", color=_MARK, clip_on=False, zorder=5,
            label=f"held out: {held_out:.3f}",
        )  # fmt: skip
    above.set_ylabel("loss, nats per byte")
    above.set_title(title, loc="left", fontsize=11, color=_INK, pad=12)
    if above.get_legend_handles_labels()[1]:
        above.legend(frameon=False, labelcolor=_INK, fontsize=9)
    below.plot(steps, [row["lr"] for row in rows], color=_INK, linewidth=1.2)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.yaxis.get_offset_text().set_fontsize(8)
    for panel in (above, below):
        _clean(panel)


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean of each loss and its neighbours under a bell as wide as a few hundredths of the run; NaN is passed over."""
    width = max(1.0, len(losses) / 80)
    reach = math.ceil(3 * width)
    bell = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(reach + 1)]
    means = []
    for middle in range(len(losses)):
        first, last = max(0, middle - reach), min(len(losses), middle + reach + 1)
        near = [(bell[abs(step - middle)], losses[step]) for step in range(first, last) if math.isfinite(losses[step])]
        weight = sum(share for share, _ in near)
        means.append(sum(share * loss for share, loss in near) / weight if weight else math.nan)
    return means


def _clean(panel: Axes) -> None:
    """Only what carries information: two spines, a light grid, quiet ticks."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_INK)
    panel.grid(color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_INK, labelsize=9)
    panel.yaxis.label.set_color(_INK)
    panel.xaxis.label.set_color(_INK)
    panel.margins(x=0.01)
