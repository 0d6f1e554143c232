"""A program: train on the pretend device and as plain PyTorch does, and print what happened as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

import pretend_device
import windlass
from windlass.backends.generic.device import GenericAccelerator, open_device

STEPS = 5


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))


def make_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(STEPS)]


def train_plainly() -> list[float]:
    model, losses = make_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for x in make_batches():
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_on(accelerator: GenericAccelerator, stage: int) -> list[float]:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
    }
    losses = []
    # torch swaps `.data` between device types only for its own, so a vendor's model is moved before
    model = make_model().to(accelerator.device)
    with windlass.initialize(model, config, accelerator=accelerator) as engine:
        for batch in make_batches():
            x = batch.to(accelerator.device)
            loss = (engine(x) - x.sum(dim=1, keepdim=True)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def draw_again(accelerator: GenericAccelerator) -> bool:
    """Whether device and host draw the same after their state has been restored."""

    def draw() -> list[float]:
        on_device = torch.rand(3, device=accelerator.device)
        return [*on_device.to("cpu").tolist(), *torch.rand(3).tolist()]

    accelerator.seed(7)
    state = accelerator.rng_state()
    first, second = draw(), draw()
    accelerator.set_rng_state(state)
    return draw() == first != second


def main(stages: list[int]) -> dict[str, Any]:
    module = pretend_device.register()
    accelerator = open_device(pretend_device.NAME, name="vendor")
    kept = accelerator.memory.empty((3, 5), torch.float32, tag="kept")
    report = {
        "name": accelerator.name,
        "facts": accelerator.facts,
        "draws": draw_again(accelerator),
        "losses": {stage: train_on(accelerator, stage) for stage in stages},
        "wanted": train_plainly(),
        "used": accelerator.memory.stats().used.value,
        "by_tag": accelerator.memory.stats().by_tag,
        "calls": module.calls,
    }
    accelerator.memory.release(kept)
    report["left"] = accelerator.memory.stats().used.value
    return report


if __name__ == "__main__":
    print(json.dumps(main([int(stage) for stage in sys.argv[1:]])))
