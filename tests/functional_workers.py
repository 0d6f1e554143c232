"""Workers for tests/ranks/test_functional.py: GPTs whose norms and loss are the accelerator's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import windlass
from windlass import functional
from windlass.accelerator.interface import Accelerator
from windlass.conformance.opening import opened
from windlass.conformance.training import LR, WEIGHT_DECAY, config_of, my_part, windlass_ranks
from windlass.models import GPT, Linear, ModelShape

ROWS, STEPS = 4, 5


class LossHead(Linear):
    """A head that is called with what it needs for the loss: its weight is read in its own forward."""

    def forward(self, x: Tensor, targets: Tensor | None = None, accelerator: Accelerator | None = None) -> Tensor:
        if targets is None or accelerator is None:
            return super().forward(x)
        return functional.linear_cross_entropy(x, self.weight, targets, accelerator, chunk=7)


class FusedGPT(GPT):
    """The GPT, but for how its loss comes about: in its head's forward, or by reading its head's weight."""

    def __init__(self, shape: ModelShape, accelerator: Accelerator, *, inside: bool) -> None:
        super().__init__(shape)
        self.accelerator, self.inside = accelerator, inside
        self.head.__class__ = LossHead

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.inside:
            loss: Tensor = self.head(x, targets, self.accelerator)
            return loss
        return functional.linear_cross_entropy(x, self.head.weight, targets, self.accelerator)


def make_shape(tied: bool) -> ModelShape:
    return ModelShape("test", width=16, layers=2, heads=2, sequence_length=12, vocabulary=40, tied=tied)


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(40, (ROWS, 13), generator=random)
    return ids[:, :-1], ids[:, 1:]


def train_fused(
    stages: list[int], tied: bool, inside: bool, norms: str, more: dict[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """Losses and final weights at each stage. `norms` says when kernels are given to the norms: "before" or "after"
    initialize; of each also which kernels ran."""
    results = {}
    with opened() as accelerator:
        for stage in stages:
            torch.manual_seed(0)
            model = FusedGPT(make_shape(tied), accelerator, inside=inside)
            named = functional.use_kernels(model, accelerator) if norms == "before" else []
            config = config_of(stage, 1, windlass_ranks(), ROWS, **(more or {}))
            with windlass.initialize(model, config, accelerator=accelerator) as engine:
                if norms == "after":
                    named = functional.use_kernels(model, accelerator)
                losses = []
                for step in range(STEPS):
                    parts = (my_part(one, engine.rank, engine.num_ranks, 0, 1) for one in make_batch(step))
                    engine.backward(engine(*parts))
                    engine.step()
                    losses.append(engine.loss)
                residency = engine.executor.residency
                results[stage] = {
                    "losses": losses,
                    "state": engine.full_state_dict(),
                    "named": named,
                    "kernels": {name for name, _ in accelerator.counters.kernels},
                    "extra_slots": 0 if residency is None else residency.extra_slots,
                }
            accelerator.counters.reset()
    return results


def train_plain(tied: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The same by PyTorch alone, on the whole batch."""
    torch.manual_seed(0)
    model = GPT(make_shape(tied))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(*make_batch(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


def norm_names(tied: bool) -> list[str]:
    """The norms of the model, as torch names them."""
    with torch.device("meta"):
        model = GPT(make_shape(tied))
    return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
