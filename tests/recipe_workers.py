"""Workers that run the built-in training job on ranks, and the same job in plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from windlass.config import Config
from windlass.config_models import MuonParams
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


def train_by_plain_muon(config: Config, model: str, steps: int, seed: int) -> list[float]:
    """Loss of each step by Muon as it was published (Jordan et al. 2024), with the scale and decay of Liu et al. 2025:
    one process, one matrix after the other, in fp64 but for the model itself."""
    params = config.optimizer.params
    assert isinstance(params, MuonParams)
    torch.manual_seed(seed)
    module = build_model(model)
    text = load_text(None, module.shape.sequence_length)
    matrices: list[tuple[torch.nn.Parameter, int, torch.Tensor]] = []  # parameter, first row, momentum
    for name, parameter in module.blocks.named_parameters():
        if parameter.dim() == 2:
            parts = 3 if "query_key_value" in name else 1
            rows, columns = parameter.shape[0] // parts, parameter.shape[1]
            matrices += [
                (parameter, part * rows, torch.zeros(rows, columns, dtype=torch.float64)) for part in range(parts)
            ]
    ours = {id(parameter) for parameter, _, _ in matrices}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in ours]
    adamw = torch.optim.AdamW(
        rest, lr=params.adam_lr, betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
    )
    losses = []
    for step in range(steps):
        module.zero_grad()
        loss = module(*text.samples(seed, step, config.train_batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clipping)
        adamw.step()
        for parameter, first, momentum in matrices:
            assert parameter.grad is not None
            own = slice(first, first + len(momentum))
            gradient = parameter.grad[own].double()
            momentum.lerp_(gradient, 1 - params.momentum)
            direction = _orthogonalise_plainly(gradient.lerp(momentum, params.momentum))
            size = 0.2 * max(momentum.shape) ** 0.5
            with torch.no_grad():
                weight = (
                    parameter[own].double() * (1 - params.muon_lr * params.weight_decay)
                    - params.muon_lr * size * direction
                )
                parameter[own] = weight.float()
        losses.append(loss.item())
    return losses


def _orthogonalise_plainly(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton-Schulz with the published coefficients."""
    x: torch.Tensor = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
