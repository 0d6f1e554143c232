"""The rows of the table with AdamW: what the runs of a candidate gave, over the floor, and whether losses agree."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from peer_ranks import workload
from peer_ranks.candidates import FLOOR, RANKS, Candidate
from peer_ranks.launching import Run
from rich.box import SIMPLE_HEAD
from rich.table import Table

LOSS_TOLERANCE = 0.02  # of the reference at the last step: systems round to bf16 in different places
CONTROL = 0.75  # of the floor's distance from the reference; a system that exchanges nothing is at about 1


@dataclass(frozen=True)
class Row:
    """A candidate over all rounds."""

    name: str
    system: str
    stage: int | None
    precision: str
    outcome: str  # "measured", or why not
    step_ms: float | None = None  # median over rounds of the median step
    over_floor: float | None = None  # median over rounds of the median step over its round's floor
    lowest_over_floor: float | None = None  # of all timed steps
    highest_over_floor: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    update_ms: float | None = None
    peak_resident_mib: float | None = None
    processor_ms: float | None = None  # processor time of one rank per step
    last_loss: float | None = None
    last_loss_apart: float | None = None  # from the reference, as a part of it; the worst round
    losses_apart: float | None = None  # the same, averaged over all steps
    losses_agree: bool | None = None  # None: not measured, or the floor, which trains two models


def group_floors(runs: list[Run]) -> dict[int, list[float]]:
    """By round, the median steps of its three floor runs, in milliseconds."""
    floors: dict[int, list[float]] = {}
    for run in runs:
        if run.candidate == FLOOR:
            floors.setdefault(run.round, []).append(statistics.median(run.total_ms))
    return floors


def find_reference_losses(runs: list[Run]) -> tuple[str, list[float]]:
    """What the losses of each step are compared with: DDP's, or the median of all if DDP was not measured."""
    curves = [run.losses for run in runs if run.losses and run.candidate.system == "ddp"]
    name = "DDP" if curves else "the median row"
    curves = curves or [run.losses for run in runs if run.losses and run.candidate != FLOOR]
    return name, [statistics.median(losses) for losses in zip(*curves, strict=True)]


def make_row(candidate: Candidate, runs: list[Run], floors: dict[int, float], reference: list[float]) -> Row:
    """Sum up one candidate over the rounds; `losses_agree` is still open."""
    mine = [run for run in runs if run.candidate == candidate]
    heading = (candidate.name, candidate.system, candidate.stage, candidate.precision)
    failed = next((run.reason for run in mine if run.reason), "")
    if failed:
        return Row(*heading, failed)

    def median(key: str) -> float:
        return statistics.median(statistics.median(getattr(run, key)) for run in mine)

    ratios = [milliseconds / floors[run.round] for run in mine for milliseconds in run.total_ms]
    # Nothing to compare with, if every system failed: then the floor alone is in the table.
    apart = [[abs(a - b) / b for a, b in zip(run.losses, reference, strict=True)] for run in mine if reference]
    return Row(
        *heading,
        "measured",
        step_ms=median("total_ms"),
        over_floor=statistics.median(statistics.median(run.total_ms) / floors[run.round] for run in mine),
        lowest_over_floor=min(ratios),
        highest_over_floor=max(ratios),
        forward_ms=median("forward_ms"),
        backward_ms=median("backward_ms"),
        update_ms=median("step_ms"),
        peak_resident_mib=max(run.peak_resident_mib for run in mine),
        processor_ms=median("processor_ms"),
        last_loss=statistics.median(run.losses[-1] for run in mine),
        last_loss_apart=max((steps[-1] for steps in apart), default=None),
        losses_apart=max((statistics.fmean(steps) for steps in apart), default=None),
    )


def check_losses(rows: list[Row]) -> list[Row]:
    """The rows with `losses_agree` set, the floor first as before.

    A part of the reference alone is too blunt: over a few steps even the floor, whose ranks never exchange a gradient,
    stays within 2%. So the floor is the control, and a row must be clearly nearer than it, on average.
    """
    floor, *others = rows
    checked = [floor]
    for row in others:
        if row.last_loss_apart is None or row.losses_apart is None or floor.losses_apart is None:
            checked.append(row)
            continue
        agree = row.last_loss_apart <= LOSS_TOLERANCE and row.losses_apart < CONTROL * floor.losses_apart
        checked.append(replace(row, losses_agree=agree))
    return checked


def make_table(rows: list[Row], reference: str) -> Table:
    """The rows for people."""
    caption = (
        f"milliseconds: mean of {RANKS} ranks, median over steps and rounds; "
        f"loss: at the last step, checked against {reference}"
    )
    table = Table(
        title=f"One optimizer step of {workload.SHAPE.num_parameters / 1e6:.1f} M parameters",
        caption=caption,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("system", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    for heading in (
        "step ms",
        "over floor",
        "lowest-highest",
        "forward",
        "backward",
        "update",
        "processor",
        "peak MiB",
        "loss",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.outcome != "measured":
            short = row.outcome if row.outcome == "not installed" else "failed"
            table.add_row(row.name, row.precision, "-", "-", short, *["-"] * 6)
            continue
        loss = f"{row.last_loss:.3f}" + (" [red]WRONG[/]" if row.losses_agree is False else "")
        table.add_row(
            row.name, row.precision, f"{row.step_ms:.0f}", f"{row.over_floor:.2f}",
            f"{row.lowest_over_floor:.2f}-{row.highest_over_floor:.2f}", f"{row.forward_ms:.0f}",
            f"{row.backward_ms:.0f}", f"{row.update_ms:.0f}", f"{row.processor_ms:.0f}",
            f"{row.peak_resident_mib:.0f}", loss,
        )  # fmt: skip
    return table
