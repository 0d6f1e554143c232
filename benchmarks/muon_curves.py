"""Muon beside AdamW on the same text: what each learns from as many tokens, which rates suit each, and whether every
backend learns the same.

    python benchmarks/muon_curves.py compare [--models nano=300,tiny=100] [--seeds 1,2] [--plot FILE]
    python benchmarks/muon_curves.py tune [--models nano=300] [--seeds 1]
    python benchmarks/muon_curves.py agree [--models nano=20] [--backends cpu,sim,xla] [--ranks 1]

All runs are `windlass train`, in one process each, as many steps as --models says, with the recipe's settings but for
the rates. `tune` tries GRID, and `compare` takes BEST, the winners of both optimizers. `agree` trains in fp32, with the
interpreter that it is started with, so `xla` needs the environment of `make test-xla`. Runs are kept in --out, and one
that is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from windlass.recipe import default_config
from windlass.report import smooth

OPTIMIZERS = ("adamw", "muon")
LABELS = {"adamw": "AdamW", "muon": "Muon"}
Rates = tuple[float, ...]  # AdamW: lr; Muon: of the matrices, of the rest
GRID: dict[str, dict[str, tuple[Rates, ...]]] = {
    "nano": {
        "adamw": ((2e-3,), (4e-3,), (8e-3,)),
        "muon": ((2e-3, 2e-3), (4e-3, 4e-3), (8e-3, 8e-3), (16e-3, 8e-3), (32e-3, 8e-3)),
    },
    "tiny": {"adamw": ((1.5e-3,), (3e-3,)), "muon": ((3e-3, 3e-3), (6e-3, 6e-3))},
}
"""Learning rates that `tune` tries."""
BEST: dict[str, dict[str, Rates]] = {
    "nano": {"adamw": (4e-3,), "muon": (16e-3, 8e-3)},
    "tiny": {"adamw": (1.5e-3,), "muon": (6e-3, 6e-3)},
}
"""What `tune` found, which `compare` takes."""


@dataclass(frozen=True)
class Run:
    """One finished run of `windlass train`."""

    optimizer: str
    seed: int
    losses: list[float]
    tokens_per_step: float
    held_out: float
    step_ms: float  # median


def main() -> None:
    """Make the runs, print the table, and draw what was asked for."""
    options = _parse()
    {"compare": compare, "tune": tune, "agree": agree}[options.question](options, Console())


def compare(options: argparse.Namespace, console: Console) -> None:
    """Both optimizers, every model and seed."""
    table = Table(title="held-out loss, nats per byte")
    for column in ("model", "steps", "seed", *(LABELS[one] for one in OPTIMIZERS), "ms per step"):
        table.add_column(column, justify="left" if column == "model" else "right")
    found: dict[str, list[Run]] = {}
    for model, steps in options.models.items():
        for seed in options.seeds:
            runs = [
                _train(options, model, seed, _config(options, model, optimizer, BEST[model][optimizer]))
                for optimizer in OPTIMIZERS
            ]
            found.setdefault(model, []).extend(runs)
            times = " / ".join(f"{run.step_ms:.0f}" for run in runs)
            table.add_row(model, str(steps), str(seed), *(f"{run.held_out:.3f}" for run in runs), times)
            console.print(f"{model}, seed {seed}: Muon passes AdamW's best loss {_saved(*runs)}")
    console.print(table)
    if options.plot:
        draw(Path(options.plot), found)


def _saved(adamw: Run, muon: Run) -> str:
    """After what part of the steps one smoothed loss is below all of the other."""
    goal = min(smooth(adamw.losses))
    step = next((step for step, loss in enumerate(smooth(muon.losses), 1) if loss <= goal), None)
    return "never" if step is None else f"after {step / len(muon.losses):.0%} of the steps"


def tune(options: argparse.Namespace, console: Console) -> None:
    """Every pair of rates of the grid."""
    for model, steps in options.models.items():
        table = Table(title=f"{model}: held-out loss after {steps} steps")
        for column in ("optimizer", "learning rates", *(f"seed {seed}" for seed in options.seeds)):
            table.add_column(column)
        for optimizer, choices in GRID[model].items():
            for rates in choices:
                config = _config(options, model, optimizer, rates)
                runs = [_train(options, model, seed, config) for seed in options.seeds]
                shown = ", ".join(f"{rate:g}" for rate in rates)
                table.add_row(LABELS[optimizer], shown, *(f"{run.held_out:.3f}" for run in runs))
        console.print(table)


def agree(options: argparse.Namespace, console: Console) -> None:
    """The same training by Muon on several backends; the first one is what the others are held against."""
    for model, steps in options.models.items():
        config = default_config(model, steps, options.ranks, optimizer="muon")  # fp32: no fast dtype is named
        runs = {one: _train(options, model, options.seeds[0], config, one) for one in options.backends}
        first = runs[options.backends[0]]
        table = Table(title=f"{model} by Muon, {options.ranks} rank(s), fp32, {steps} steps")
        for column in ("backend", "last loss", "held out", "largest relative distance", "ms per step"):
            table.add_column(column, justify="left" if column == "backend" else "right")
        for backend, run in runs.items():
            apart = max(abs(a - b) / b for a, b in zip(run.losses, first.losses, strict=True))
            table.add_row(backend, f"{run.losses[-1]:.5f}", f"{run.held_out:.5f}", f"{apart:.1e}", f"{run.step_ms:.0f}")
        console.print(table)


def _config(options: argparse.Namespace, model: str, optimizer: str, rates: Rates) -> dict[str, Any]:
    """The recipe's, in bf16, with these rates."""
    config = default_config(model, options.models[model], options.ranks, ["bfloat16"], optimizer=optimizer)
    keys = ("lr",) if optimizer == "adamw" else ("muon_lr", "adam_lr")
    config["optimizer"]["params"] |= dict(zip(keys, rates, strict=True))
    return config


def _train(options: argparse.Namespace, model: str, seed: int, config: dict[str, Any], backend: str = "cpu") -> Run:
    """One run, in a folder that is named for what is particular about it."""
    optimizer, steps = str(config["optimizer"]["type"]).lower(), options.models[model]
    rates = "-".join(f"{value:g}" for key, value in config["optimizer"]["params"].items() if key.endswith("lr"))
    precision = "bf16" if config["bf16"]["enabled"] else "fp32"
    folder = Path(options.out) / f"{model}-{optimizer}-{rates}-{precision}-{steps}-{seed}-{backend}"
    if options.ranks > 1:
        folder = folder.with_name(f"{folder.name}-{options.ranks}")
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "given.json").write_text(json.dumps(config))
        arguments = {"accelerator": backend, "out": folder, "ranks": options.ranks, "model": model}
        arguments |= {"steps": steps, "seed": seed}
        command = [sys.executable, "-m", "windlass.cli", "train", str(folder / "given.json")]
        command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        environment = os.environ | {"PJRT_DEVICE": "CPU"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    times = sorted(row["step_ms"] for row in rows)
    tokens = rows[-1]["tokens_per_s"] * rows[-1]["step_ms"] / 1e3
    losses = [row["loss"] for row in rows]
    return Run(optimizer, seed, losses, tokens, summary["held_out_loss"], times[len(times) // 2])


def draw(path: Path, found: dict[str, list[Run]]) -> None:
    """A panel for each model: the smoothed loss of every run over tokens, and where it stands on held-out text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4.2), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    styles = {
        "adamw": {"color": "#8a929c", "linestyle": "--", "marker": "o"},
        "muon": {"color": "#111418", "linestyle": "-", "marker": "D"},
    }
    for panel, (model, runs) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for optimizer, style in styles.items():
            own = [run for run in runs if run.optimizer == optimizer]
            line = {key: style[key] for key in ("color", "linestyle")}
            for place, run in enumerate(own):
                millions = [step * run.tokens_per_step / 1e6 for step in range(1, len(run.losses) + 1)]
                label = {"label": f"{LABELS[optimizer]}, each of {len(own)} seeds"} if place == 0 else {}
                panel.plot(millions, smooth(run.losses), linewidth=1.5, **line, **label)
                held = {"label": f"{LABELS[optimizer]}, held out"} if place == 0 else {}
                panel.plot(
                    millions[-1:], [run.held_out], marker=style["marker"], linestyle="none", markersize=6,
                    markerfacecolor="white", markeredgecolor=style["color"], markeredgewidth=1.5, clip_on=False,
                    zorder=5, **held,
                )  # fmt: skip
        _finish(panel, model)
    figure.savefig(path)


def _finish(panel: Any, model: str) -> None:
    panel.set_title(model, loc="left", fontsize=11)
    panel.set_xlabel("million tokens (bytes) trained on")
    panel.set_ylabel("loss, nats per byte")
    panel.set_ylim(top=4)
    panel.legend(frameon=False, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e3e6ea", linewidth=0.8)
    panel.set_axisbelow(True)


def _parse() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def models(text: str) -> dict[str, int]:
        return {name: int(steps or 300) for name, _, steps in (word.partition("=") for word in words(text))}

    parser = argparse.ArgumentParser(description="Muon beside AdamW")
    parser.add_argument("question", choices=("compare", "tune", "agree"))
    parser.add_argument("--models", type=models, default={"nano": 300}, help="name=steps, ...")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2])
    parser.add_argument("--backends", type=words, default=["cpu", "sim", "xla"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", default=".cache/muon_curves", help="folder of the runs")
    parser.add_argument("--plot", help="where to draw the curves")
    return parser.parse_args()


if __name__ == "__main__":
    main()
