"""Workers that run the built-in training job on ranks, and the same job in plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from windlass.models import build_model
from windlass.recipe import TrainOptions, train
from windlass.text import load_text


def run_recipe(options: TrainOptions) -> float | None:
    """The held-out loss; the metrics are in the run's folder."""
    return train(options).held_out_loss


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_plainly(config: Mapping[str, Any], model: str, steps: int, seed: int) -> tuple[list[float], float]:
    """Loss of each step and of the held-out text, by torch.optim.AdamW on the whole batch."""
    torch.manual_seed(seed)
    module = build_model(model)
    text = load_text(None, module.shape.sequence_length)
    optimizer = torch.optim.AdamW(module.parameters(), **config["optimizer"]["params"])
    losses = []
    for step in range(steps):
        ids, targets = text.samples(seed, step, config["train_batch_size"])
        loss = module(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, module(*text.evaluation_samples()).item()
