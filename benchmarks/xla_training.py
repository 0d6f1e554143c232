"""The same training on the CPU backend and on XLA's CPU, side by side: losses, time per step, programs.

    python benchmarks/xla_training.py [--model tiny] [--steps 50] [--ranks 1] [--rounds 2]
                                      [--plot docs/xla-loss.png] [--json FILE]

Needs the environment of `make test-xla`. Each round runs `windlass train` once on each backend, in turns, in fp32 with
the same seed; steps are timed after a warm-up of ten. XLA uses all cores, so the CPU backend gets as many threads. The
floor is 6 x parameters x tokens floating-point operations at the rate that one matrix product reaches in torch on as
many threads, measured in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

BACKENDS = ("cpu", "xla")
WARM_UP = 10
BOUND = 1e-4
"""Largest relative distance of the losses of one step that counts as equal after 50 steps."""


@dataclass(frozen=True)
class Run:
    """What one run of one backend came to."""

    backend: str
    losses: list[float]
    step_ms: float  # median after the warm-up
    floor_ms: float  # of the same round


def main() -> None:
    """Run the rounds, print the table, and write what was asked for."""
    options = _parse()
    runs = [
        run
        for round_ in range(options.rounds)
        for run in _run_round(options, BACKENDS if round_ % 2 == 0 else BACKENDS[::-1])
    ]
    by_backend = {backend: [run for run in runs if run.backend == backend] for backend in BACKENDS}
    first = {backend: by_backend[backend][0].losses for backend in BACKENDS}
    apart = [abs(a - b) / abs(b) for a, b in zip(first["xla"], first["cpu"], strict=True)]
    table = Table(title=f"{options.model}, {options.ranks} rank(s), {options.steps} steps, fp32")
    for column in ("backend", "ms per step", "over floor", "final loss"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for backend, own in by_backend.items():
        step, floor = (statistics.median(getattr(run, key) for run in own) for key in ("step_ms", "floor_ms"))
        table.add_row(backend, f"{step:.1f}", f"{step / floor:.2f}", f"{own[0].losses[-1]:.5f}")
    ratio = statistics.median(
        xla.step_ms / cpu.step_ms for xla, cpu in zip(by_backend["xla"], by_backend["cpu"], strict=True)
    )
    console = Console()
    console.print(table)
    console.print(f"xla takes {ratio:.2f} times as long as cpu; losses are at most {max(apart):.1e} apart, relatively")
    if options.plot:
        save_plot(Path(options.plot), first, apart, f"{options.model}, one seed, fp32")
    if options.json:
        data = {"options": vars(options), "ratio": ratio, "apart": max(apart), "runs": [asdict(run) for run in runs]}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")


def _run_round(options: argparse.Namespace, backends: tuple[str, ...]) -> list[Run]:
    rate = _matmul_rate(options.threads * options.ranks)
    runs = []
    for backend in backends:
        with tempfile.TemporaryDirectory() as folder:
            summary, rows = _train(options, backend, Path(folder))
        tokens = rows[-1]["tokens_per_s"] * rows[-1]["step_ms"] / 1e3
        runs.append(
            Run(
                backend,
                [row["loss"] for row in rows],
                statistics.median(row["step_ms"] for row in rows[WARM_UP:]),
                6 * summary["parameters"] * tokens / rate * 1e3,
            )
        )
    return runs


def _train(options: argparse.Namespace, backend: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = folder / "config.json"
    config.write_text(json.dumps(_config(options)))
    command = [
        sys.executable,
        "-m",
        "windlass.cli",
        "train",
        str(config),
        "--accelerator",
        backend,
        "--out",
        str(folder),
    ]
    command += ["--ranks", str(options.ranks), "--model", options.model, "--steps", str(options.steps), "--seed", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PJRT_DEVICE": "CPU"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), rows


def _config(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's own, in fp32 on every backend."""
    from windlass.recipe import default_config

    return default_config(options.model, options.steps, options.ranks)


def _matmul_rate(threads: int) -> float:
    """Floating-point operations per second of a product of 1536 x 1536 matrices in fp32; the best of ten."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size, best = 1536, float("inf")
    left, right = torch.rand(size, size), torch.rand(size, size)
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * size**3 / best


def save_plot(path: Path, losses: dict[str, list[float]], apart: list[float], title: str) -> None:
    """Both curves above, how far they are apart below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    steps = range(1, len(apart) + 1)
    above.plot(steps, losses["cpu"], color="#a9c4de", linewidth=5, label="cpu")
    above.plot(steps, losses["xla"], color="#1f5f99", linewidth=1.4, label="xla")
    above.set_ylabel("loss, nats per byte")
    above.set_title(title, loc="left", fontsize=11)
    above.legend(frameon=False)
    below.plot(steps, [max(value, 1e-9) for value in apart], color="#c2571a", linewidth=1.4)
    below.axhline(BOUND, color="#30343b", linewidth=0.8, linestyle="--")
    below.text(1, BOUND * 1.3, "bound", fontsize=8, va="bottom")
    below.set_yscale("log")
    below.set_ylim(1e-9, BOUND * 10)
    below.set_ylabel("relative distance")
    below.set_xlabel("step")
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e3e6ea", linewidth=0.8)
        panel.set_axisbelow(True)
    figure.savefig(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cpu and xla side by side")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of each rank; default: its share of the cores")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plot", help="where to draw the losses")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    options.threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.ranks)
    return options


if __name__ == "__main__":
    main()
