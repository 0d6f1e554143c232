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
import re
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from peer_ranks import workload
from peer_ranks.candidates import (
    FLOOR,
    RANKS,
    STAGES,
    SYSTEMS,
    Candidate,
    list_candidates,
    list_muon_candidates,
    order_round,
)
from peer_ranks.launching import CACHE, CORPUS, Run, has_deepspeed, hold_machine, run_candidate
from peer_ranks.muon_rows import MuonRow, find_floors, judge_goals, make_muon_rows, make_muon_table
from peer_ranks.rows import Row, check_losses, find_reference_losses, group_floors, make_row, make_table
from rich.console import Console

FLOOR_TOLERANCE = 1.1  # highest over lowest floor run of a round; more than that, and the machine was not quiet
RESULTS = Path(__file__).resolve().parent / "results"
OWN_DEEPSPEED = CACHE / "deepspeed" / "bin" / "python"
DEEPSPEED = OWN_DEEPSPEED if OWN_DEEPSPEED.exists() else Path(sys.executable)


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


def results_file(machine: dict[str, object], *, muon: bool) -> Path:
    """Where `--save` writes: the date, what was compared if it was not AdamW, and the machine."""
    place = re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {machine['cores']} cores".lower())
    return RESULTS / f"{time.strftime('%Y-%m-%d')}-{'muon-' if muon else ''}{place}.json"


def run_all(
    plan: list[tuple[int, Candidate]], deepspeed: Path, progress: Console, *, warm: int, steps: int, profile: str | None
) -> list[Run]:
    """Everything in its order. Without the floor nothing can be compared: SystemExit."""
    runs: list[Run] = []
    for position, (number, candidate) in enumerate(plan, start=1):
        python = str(deepspeed.absolute()) if candidate.system == "deepspeed" else sys.executable
        table_file = CACHE / f"profile-{candidate.name}.txt" if candidate.name == profile else None
        run = run_candidate(candidate, number, python, warm=warm, steps=steps, profile=table_file)
        runs.append(run)
        outcome = run.reason or f"{statistics.median(run.total_ms):.0f} ms"
        progress.print(f"{position}/{len(plan)} {candidate.name}: {outcome}", highlight=False, markup=False)
        if run.reason and candidate == FLOOR:
            raise SystemExit("the floor failed, and nothing can be compared without it")
    return runs


def main(
    systems: Annotated[str, typer.Option(help="The systems to run beside the floor.")] = ",".join(SYSTEMS),
    stages: Annotated[str, typer.Option(help="The ZeRO stages of DeepSpeed and windlass.")] = ",".join(STAGES),
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each run.")] = 6,
    warm: Annotated[
        int, typer.Option(min=2, help="Steps before the timed ones; PyTorch is slow in the second one still.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is run; every second one backwards.")] = 1,
    muon: Annotated[bool, typer.Option("--muon", help="Compare training with Muon.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every run and row there.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Write them into benchmarks/results.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="Profile one more step of this row, such as windlass-bf16-3.")
    ] = None,
    deepspeed_python: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The interpreter whose environment holds DeepSpeed.")
    ] = DEEPSPEED,
) -> None:
    """Compare windlass with its peers on this machine."""
    chosen_stages = [int(stage) for stage in read_choices("--stages", stages, STAGES)]
    list_those = list_muon_candidates if muon else list_candidates
    candidates = list_those(read_choices("--systems", systems, SYSTEMS), chosen_stages)
    if profile is not None:
        read_choices("--profile", profile, (FLOOR.name, *(each.name for each in candidates)))
    machine = describe_machine()
    if save and json_file is None:
        json_file = results_file(machine, muon=muon)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)  # a bad path must not cost the whole run
        json_file.touch()
    progress = Console(stderr=True)
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
    runs = run_all(plan, deepspeed_python, progress, warm=warm, steps=steps, profile=profile)

    floor_runs = find_floors(runs, warm) if muon else group_floors(runs)
    floors = {number: statistics.median(medians) for number, medians in floor_runs.items()}
    unrest = max(max(medians) / min(medians) for medians in floor_runs.values())
    out = Console(width=max(150, Console().width))  # no column is cut
    content: dict[str, object] = {}
    rows: list[MuonRow] | list[Row]
    if muon:
        rows = make_muon_rows([FLOOR, *candidates], runs, floors, warm)
        out.print(make_muon_table(rows))
        for line in judge_goals(rows):
            out.print(line, highlight=False)
    else:
        reference, reference_losses = find_reference_losses(runs)
        measured = [each for each in (FLOOR, *candidates) if each not in absent]
        rows = check_losses([make_row(each, runs, floors, reference_losses) for each in measured])
        rows += [Row(each.name, each.system, each.stage, each.precision, "not installed") for each in absent]
        out.print(make_table(rows, reference))
        content = {"reference": reference, "reference_losses": reference_losses}
    if unrest > FLOOR_TOLERANCE:
        progress.print(
            f"The floor runs of a round lie up to {unrest:.2f} times apart: the machine was busy, and differences "
            "between rows that are not far larger say nothing; run it alone, with --rounds 3 or more.",
            style="yellow",
        )
    if profile is not None:
        progress.print(f"profile of rank 0: {CACHE / f'profile-{profile}.txt'}", highlight=False)
    if json_file is not None:
        content |= {
            "began": began,
            "machine": machine,
            "optimizer": "muon" if muon else "adamw",
            "ranks": RANKS,
            "warm": warm,
            "steps": steps,
            "rounds": rounds,
            "floor_ms": floors,
            "floor_runs_ms": floor_runs,
            "rows": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    wrong = [row.name for row in rows if row.losses_agree is False]
    if muon:  # that a peer trains something else is a result
        wrong = [name for name in wrong if name.startswith("windlass")]
    bad = [row.name for row in rows if row.outcome not in ("measured", "not installed") or row.name in wrong]
    if bad:
        raise SystemExit(f"these rows failed or trained something else: {', '.join(bad)}")


if __name__ == "__main__":
    typer.run(main)
