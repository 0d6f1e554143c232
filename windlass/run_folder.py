"""What a run leaves behind: metrics.jsonl, summary.json, config.json, plan.json, loss.png and checkpoints/."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: a line of metrics.jsonl."""

    step: int  # counted from 1
    loss: float  # mean over all samples of the step, nats per byte
    grad_norm: float | None  # before clipping
    lr: float
    tokens_per_s: float  # over all ranks
    step_ms: float
    loss_scale: float
    skipped: bool  # a gradient was not finite, so no weight changed


@dataclass(frozen=True)
class Summary:
    """The whole run: summary.json. Losses are nats per byte; memory and counters are those of rank 0."""

    model: str
    optimizer: str  # "adamw", "muon", ...
    parameters: int
    steps: int  # done, those before a resume included
    steps_wanted: int
    first_loss: float | None
    final_loss: float | None
    held_out_loss: float | None  # None where the run was stopped before its end
    tokens_per_s: float | None  # median over the steps of this process, the first few left out
    skipped_steps: int
    num_ranks: int
    stage: int
    precision: str
    accelerator: str
    peak_bytes: Mapping[str, Mapping[str, Any]]  # tier -> kind (exact, estimate, unknown) and value
    used_bytes: Mapping[str, Mapping[str, Any]]
    counters: Mapping[str, Mapping[str, int]]
    plan_hash: str
    text: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]


class RunFolder:
    """The folder of one run. Only rank 0 writes to it; checkpoints are the engine's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.plot = path / "loss.png"

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / "latest").exists()

    def read_optimizer(self) -> str | None:
        """With what the run was begun, by its config.json; None if there is none. Raises ValueError."""
        path = self.path / "config.json"
        if not path.exists():
            return None
        try:
            return str(json.loads(path.read_text())["optimizer"]["type"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: this is no configuration of a run, so it does not say which optimizer to go on with; put it "
                "back or remove it"
            ) from error

    def start(self, first_step: int) -> list[dict[str, Any]]:
        """Make the folder; keep the metrics of steps before `first_step` (counted from 0), which a resumed run goes
        on from, and return them."""
        self.path.mkdir(parents=True, exist_ok=True)
        kept = [row for row in self._read_metrics() if row["step"] <= first_step]
        self._replace(self.metrics, "".join(_line(row) for row in kept))
        return kept

    def add(self, metrics: StepMetrics) -> dict[str, Any]:
        """Append a step's line, and return what it says."""
        row: dict[str, Any] = _finite(asdict(metrics))
        with self.metrics.open("a") as file:
            file.write(_line(row))
        return row

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a whole file at once: a reader sees the old one or the new one."""
        self._replace(self.path / name, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def _read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # a run that was killed may leave half a line
                break
        return rows

    def _replace(self, path: Path, text: str) -> None:
        partial = path.with_name(f"{path.name}.tmp")
        partial.write_text(text)
        os.replace(partial, path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same data with None for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
