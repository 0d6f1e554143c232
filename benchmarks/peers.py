"""Train one GPT with windlass and with its peers, on 2 processes of this machine, and compare what a step takes.

    make bench-peers
    .venv/bin/python benchmarks/peers.py --systems ddp,windlass --stages 0,2 --rounds 3 --json results.json

Every figure is divided by the floor of its own round: the same training without any communication, run first, in the
middle and last. A speed counts only if the losses agree, which is checked. README.md here says how to read the table.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from peer_ranks import workload
from peer_ranks.launching import CACHE, CORPUS, FLOOR, RANKS, Candidate, Run, has_deepspeed, hold_machine, run_candidate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

SYSTEMS = ("ddp", "fsdp2", "deepspeed", "windlass")
STAGES = ("0", "1", "2", "3")
LOSS_TOLERANCE = 0.02  # of the reference at the last step: systems round to bf16 in different places
CONTROL = 0.75  # of the floor's distance from the reference; a system that exchanges nothing is at about 1
FLOOR_TOLERANCE = 1.1  # highest over lowest floor run of a round; more than that, and the machine was not quiet


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


def list_candidates(systems: list[str], stages: list[int]) -> list[Candidate]:
    """All candidates but the floor, in the order of the table."""
    candidates = []
    if "ddp" in systems:
        candidates.append(Candidate("ddp", "ddp.py", "autocast"))
    if "fsdp2" in systems:
        for variant in ("reshard", "noreshard"):
            candidates.append(Candidate("fsdp2", "fsdp2.py", "bf16 weights", variant=variant))
    if "deepspeed" in systems:
        candidates += [Candidate("deepspeed", "deepspeed_zero.py", "bf16 weights", stage) for stage in stages]
    if "windlass" in systems:
        for variant, precision in (("autocast", "autocast"), ("bf16", "bf16 weights")):
            candidates += [Candidate("windlass", "windlass_zero.py", precision, stage, variant) for stage in stages]
    return candidates


def order_round(candidates: list[Candidate], number: int) -> list[Candidate]:
    """The runs of one round: the floor first, in the middle and last, and every second round backwards.

    The rows of each system are spread over the whole round: in one block, a passing load would look like its fault.
    """
    families: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault((candidate.system, candidate.precision), []).append(candidate)
    places = {each: (index + 0.5) / len(family) for family in families.values() for index, each in enumerate(family)}
    ordered = sorted(candidates, key=places.__getitem__, reverse=number % 2 == 1)
    half = (len(ordered) + 1) // 2
    return [FLOOR, *ordered[:half], FLOOR, *ordered[half:], FLOOR]


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


def read_choices(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    """The parts of a list with commas, in the order of `known`; typer.BadParameter names an unknown one."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    for part in parts:
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise typer.BadParameter(f"there is no {part!r}, known are {', '.join(known)}{hint}", param_hint=option)
    if not parts:
        raise typer.BadParameter(f"is empty, give some of {', '.join(known)}", param_hint=option)
    return [name for name in known if name in parts]


def describe_machine() -> dict[str, object]:
    """What the figures depend on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that Linux does not name
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor, "cores": cores, "system": platform.platform(), "load": os.getloadavg()[0]}


def main(
    systems: Annotated[str, typer.Option(help="The systems to run beside the floor.")] = ",".join(SYSTEMS),
    stages: Annotated[str, typer.Option(help="The ZeRO stages of DeepSpeed and windlass.")] = ",".join(STAGES),
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each run.")] = 6,
    warm: Annotated[
        int, typer.Option(min=2, help="Steps before the timed ones; PyTorch is slow in the second one still.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is run; every second one backwards.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every run and row there.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile one more step of this row, such as windlass-bf16-3.")
    ] = None,
    deepspeed_python: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The interpreter whose environment holds DeepSpeed.")
    ] = Path(sys.executable),
) -> None:
    """Compare windlass with its peers on this machine."""
    chosen_stages = [int(stage) for stage in read_choices("--stages", stages, STAGES)]
    candidates = list_candidates(read_choices("--systems", systems, SYSTEMS), chosen_stages)
    if profile is not None:
        read_choices("--profile", profile, (FLOOR.name, *(each.name for each in candidates)))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)  # a bad path must not cost the whole run
        json_file.touch()
    progress = Console(stderr=True)
    machine = describe_machine()
    progress.print(f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f}", highlight=False)

    absent = [] if has_deepspeed(str(deepspeed_python)) else [each for each in candidates if each.system == "deepspeed"]
    plan = [
        (number, candidate)
        for number in range(rounds)
        for candidate in order_round([each for each in candidates if each not in absent], number)
    ]
    holding = ExitStack()
    try:
        holding.enter_context(hold_machine())
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    workload.write_corpus(CORPUS)
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    runs: list[Run] = []
    for position, (number, candidate) in enumerate(plan, start=1):
        python = str(deepspeed_python.absolute()) if candidate.system == "deepspeed" else sys.executable
        table_file = CACHE / f"profile-{candidate.name}.txt" if candidate.name == profile else None
        run = run_candidate(candidate, number, python, warm=warm, steps=steps, profile=table_file)
        runs.append(run)
        outcome = run.reason or f"{statistics.median(run.total_ms):.0f} ms"
        progress.print(f"{position}/{len(plan)} {candidate.name}: {outcome}", highlight=False, markup=False)
        if run.reason and candidate == FLOOR:
            raise SystemExit("the floor failed, and nothing can be compared without it")

    floor_runs = group_floors(runs)
    floors = {number: statistics.median(medians) for number, medians in floor_runs.items()}
    unrest = max(max(medians) / min(medians) for medians in floor_runs.values())
    reference, reference_losses = find_reference_losses(runs)
    measured = [each for each in (FLOOR, *candidates) if each not in absent]
    rows = check_losses([make_row(each, runs, floors, reference_losses) for each in measured])
    rows += [Row(each.name, each.system, each.stage, each.precision, "not installed") for each in absent]
    Console(width=max(140, Console().width)).print(make_table(rows, reference))  # no column is cut
    if unrest > FLOOR_TOLERANCE:
        progress.print(
            f"The floor runs of a round lie up to {unrest:.2f} times apart: the machine was busy, and differences "
            "between rows that are not far larger say nothing; run it alone, with --rounds 3 or more.",
            style="yellow",
        )
    if profile is not None:
        progress.print(f"profile of rank 0: {CACHE / f'profile-{profile}.txt'}", highlight=False)
    if json_file is not None:
        content = {
            "began": began,
            "machine": machine,
            "ranks": RANKS,
            "warm": warm,
            "steps": steps,
            "rounds": rounds,
            "floor_ms": floors,
            "floor_runs_ms": floor_runs,
            "reference": reference,
            "reference_losses": reference_losses,
            "rows": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    bad = [row.name for row in rows if row.outcome not in ("measured", "not installed") or row.losses_agree is False]
    if bad:
        raise SystemExit(f"these rows failed or trained something else: {', '.join(bad)}")


if __name__ == "__main__":
    typer.run(main)
