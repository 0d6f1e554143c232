"""The rows of the table with Muon: phases of the slowest rank, over the floor, and losses beside plain PyTorch's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peer_ranks import workload
from peer_ranks.candidates import ALONE_MUON, APART, FLOOR, PLAIN_MUON, RANKS, Candidate
from peer_ranks.launching import Run
from peer_ranks.rows import CONTROL, LOSS_TOLERANCE
from rich.box import SIMPLE_HEAD
from rich.table import Table

UPDATE_GOAL_MS = 420.0  # of windlass, where the peers take 881 to 2497
STEP_GOAL = 1.5  # times the floor
_UPDATES = 5  # after which losses are shown


@dataclass(frozen=True)
class Phases:
    """One step in milliseconds, over all ranks: the sums are exact."""

    compute_ms: float  # from the last rank's previous step to the end of the last rank's backward pass
    update_ms: float  # from there to the end of the last rank's step

    @property
    def step_ms(self) -> float:
        return self.compute_ms + self.update_ms


def find_phases(marks: Sequence[Sequence[Sequence[float]]], warm: int) -> list[Phases]:
    """Of the steps after the `warm` ones, from `Run.marks`: seconds by rank, step, and (begin, loss, gradients, end).

    A rank that is ahead waits for the others somewhere, and where is not the same in every system. So a phase ends when
    its last rank has ended it.
    """
    found = []
    for before, now in zip(range(warm - 1, len(marks[0])), range(warm, len(marks[0])), strict=False):
        began, backwarded, ended = (
            max(rank[step][place] for rank in marks) for step, place in ((before, 3), (now, 2), (now, 3))
        )
        found.append(Phases((backwarded - began) * 1e3, (ended - backwarded) * 1e3))
    return found


@dataclass(frozen=True)
class MuonRow:
    """A candidate over all rounds."""

    name: str
    optimizer: str
    precision: str
    outcome: str  # "measured", or why not
    update_ms: float | None = None  # medians over the steps of all rounds, and the lowest
    update_ms_lowest: float | None = None
    compute_ms: float | None = None
    compute_ms_lowest: float | None = None
    step_ms: float | None = None
    step_ms_lowest: float | None = None
    over_floor: float | None = None  # median over rounds of the median step over its round's floor
    update_processor_ms: float | None = None  # of the rank that took most, in the update
    loss: float | None = None  # after five updates, mean over ranks
    loss_apart: float | None = None  # from plain PyTorch's, as a part of it; the worst round
    losses_apart: float | None = None  # the same, averaged over all steps
    losses_agree: bool | None = None  # None: nothing to compare with, or another optimizer


def find_floors(runs: Sequence[Run], warm: int) -> dict[int, list[float]]:
    """By round, the median steps of its floor runs, in milliseconds."""
    floors: dict[int, list[float]] = {}
    for run in runs:
        if run.candidate == FLOOR:
            steps = [one.step_ms for one in find_phases(run.marks, warm)]
            floors.setdefault(run.round, []).append(statistics.median(steps))
    return floors


def make_muon_rows(
    candidates: Sequence[Candidate], runs: Sequence[Run], floors: dict[int, float], warm: int
) -> list[MuonRow]:
    """Sum up the rounds. Losses agree if the last is within 2 % of plain PyTorch's, and the mean distance is clearly
    smaller than that of ranks that exchange nothing."""
    measured = [run for run in runs if not run.reason]
    plain = next((run.losses for run in measured if run.candidate == PLAIN_MUON), ())
    alone = _distances(next((run.losses for run in measured if run.candidate == ALONE_MUON), ()), plain)
    return [
        _make_row(each, [run for run in runs if run.candidate == each], floors, warm, plain, alone)
        for each in candidates
    ]


def _make_row(
    candidate: Candidate,
    mine: Sequence[Run],
    floors: dict[int, float],
    warm: int,
    plain: Sequence[float],
    alone: Sequence[float],
) -> MuonRow:
    heading = (candidate.name, candidate.optimizer, candidate.precision)
    failed = next((run.reason for run in mine if run.reason), "")
    if failed or not mine:
        return MuonRow(*heading, failed or "not installed")
    by_run = [find_phases(run.marks, warm) for run in mine]
    updates, computes, steps = (
        [getattr(one, key) for phases in by_run for one in phases] for key in ("update_ms", "compute_ms", "step_ms")
    )
    apart = [_distances(run.losses, plain) for run in mine]
    checks = candidate in (PLAIN_MUON, ALONE_MUON) or candidate.variant == APART
    comparable = candidate.optimizer == "muon" and not checks and plain and alone
    over_floor = [
        statistics.median(one.step_ms for one in phases) / floors[run.round]
        for run, phases in zip(mine, by_run, strict=True)
    ]
    return MuonRow(
        *heading,
        "measured",
        statistics.median(updates), min(updates),
        statistics.median(computes), min(computes),
        statistics.median(steps), min(steps),
        statistics.median(over_floor),
        statistics.median(one for run in mine for one in run.update_processor_ms),
        statistics.median(run.losses[: _UPDATES + 1][-1] for run in mine),
        max((one[: _UPDATES + 1][-1] for one in apart if one), default=None),
        max((statistics.fmean(one) for one in apart if one), default=None),
        all(one[-1] <= LOSS_TOLERANCE and statistics.fmean(one) < CONTROL * statistics.fmean(alone) for one in apart)
        if comparable
        else None,
    )  # fmt: skip


def _distances(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(losses, reference, strict=True)] if losses and reference else []


def make_muon_table(rows: Sequence[MuonRow]) -> Table:
    """The rows for people."""
    table = Table(
        title=f"One optimizer step of {workload.SHAPE.num_parameters / 1e6:.1f} M parameters with Muon",
        caption=(
            f"milliseconds until the last of {RANKS} ranks is done, median and lowest of all steps; processor: of the "
            f"update, on the busier rank; loss: after {_UPDATES} updates, beside plain PyTorch in one process"
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("system", "optimizer", "precision"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "update",
        "lowest",
        "processor",
        "compute",
        "lowest",
        "step",
        "lowest",
        "over floor",
        "loss",
        "apart",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        heading = (row.name, row.optimizer, row.precision)
        if row.outcome != "measured":
            short = row.outcome if row.outcome == "not installed" else "failed"
            table.add_row(*heading, short, *["-"] * 9)
            continue
        times = (
            row.update_ms, row.update_ms_lowest, row.update_processor_ms,
            row.compute_ms, row.compute_ms_lowest, row.step_ms, row.step_ms_lowest,
        )  # fmt: skip
        apart = "-" if row.optimizer != "muon" or row.loss_apart is None else f"{row.loss_apart:.2%}"
        wrong = " [red]WRONG[/]" if row.losses_agree is False else ""
        table.add_row(
            *heading, *(f"{one:.0f}" for one in times), f"{row.over_floor:.2f}", f"{row.loss:.3f}", apart + wrong
        )
    return table


def judge_goals(rows: Sequence[MuonRow]) -> list[str]:
    """A line for each row of windlass with Muon that trains what the peers do: what it reached of the two goals."""
    lines = []
    for row in rows:
        if (
            row.name.startswith("windlass-muon")
            and row.losses_agree
            and row.update_ms is not None
            and row.over_floor is not None
        ):
            update = "reached" if row.update_ms <= UPDATE_GOAL_MS else "missed"
            step = "reached" if row.over_floor < STEP_GOAL else "missed"
            lines.append(
                f"{row.name}: update {row.update_ms:.0f} ms of {UPDATE_GOAL_MS:.0f}, {update}; "
                f"step {row.over_floor:.2f} of {STEP_GOAL} floors, {step}"
            )
    return lines
