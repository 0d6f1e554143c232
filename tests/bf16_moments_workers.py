"""Workers for tests/ranks/test_bf16_moments.py: moments of 16 bits, on any number of ranks and at any stage."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import windlass
from uniform_workers import uniform_cpu
from windlass.accelerator.interface import Accelerator
from windlass.conformance.models import build
from windlass.conformance.opening import opened
from windlass.conformance.training import LR, config_of, my_part, train_engine, windlass_ranks
from windlass.conformance.training_workers import ROWS, everything, part_of, same_bits

BF16 = {"enabled": True, "bf16_optimizer_states": True}
EXACT_ROWS = 16
STEPS = 6


class Exact(nn.Module):
    """Its gradients are sums of whole numbers, divided by powers of two: the same however they are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, 7) for width in (40, 9, 33))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [block(x[:, : block.in_features]).sum(1) for block in self.blocks]
        return torch.stack(outputs).sum(0).mean()


def batch_of(step: int) -> Tensor:
    """Rows of -1, 0 and 1."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-1, 2, (EXACT_ROWS, 40), generator=generator).float()


def config(stage: int, rows: int = EXACT_ROWS, bf16: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 5}}
    return config_of(stage, 1, windlass_ranks(), rows, bf16=bf16 or BF16, scheduler=schedule, **more)


def train_exactly(stage: int, uniform: bool = False, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that training this model leaves behind. One step in the middle has a gradient that is not finite."""
    device: AbstractContextManager[Accelerator] = uniform_cpu() if uniform else opened()
    torch.manual_seed(0)
    given = config(stage, **(more or {}))
    with device as accelerator, windlass.initialize(Exact(), given, accelerator=accelerator) as engine:
        for step in range(STEPS):
            loss = engine(my_part(batch_of(step), engine.rank, engine.num_ranks, 0, 1))
            engine.backward(loss * float("nan") if step == 2 else loss)
            assert bool(engine.step()) == (step != 2)
        prediction = engine.plan.prediction
        assert accelerator.memory.stats().by_tag == dict(prediction.persistent)
        owned = sum(r.numel if stage == 0 else r.shard_numel for r in engine.plan.regions if r.trainable)
        assert prediction.persistent["optimizer"] == 4 * owned
        return everything(engine)


def losses_of(stage: int, states: bool, steps: int) -> list[float]:
    """The losses of a network that learns, its moments in 16 bits or not."""
    losses = []
    section = {"enabled": True, "bf16_optimizer_states": states}
    with windlass.initialize(build("Network"), config(stage, ROWS, section)) as engine:
        for step in range(steps):
            engine.backward(engine(*part_of(engine, step % 4)))
            engine.step()
            assert engine.loss is not None
            losses.append(engine.loss)
    return losses


def save_in_mid_run(folder: str, stage: int) -> dict[str, Any]:
    """Train, save, train on; everything at both points."""
    with windlass.initialize(build("Network"), config(stage, ROWS)) as engine:
        train_engine(engine, 3)
        engine.save_checkpoint(folder)
        saved = everything(engine)
        train_engine(engine, 2, first=3)
        return {"saved": saved, "later": everything(engine)}


def continue_from(folder: str, stage: int) -> dict[str, Any]:
    """Load into an engine that has taken steps of its own, and train on."""
    with windlass.initialize(build("Network"), config(stage, ROWS)) as engine:
        train_engine(engine, 1, first=50)
        engine.load_checkpoint(folder)
        saved = everything(engine)
        train_engine(engine, 2, first=3)
        return {"saved": saved, "later": everything(engine)}


def moments_cross_precisions(folder: str, stage: int) -> None:
    """A checkpoint with moments of 32 bits is rounded to nearest by an engine of 16, and one of 16 loses nothing."""
    wide = {"enabled": True}
    with windlass.initialize(build("Network"), config(stage, ROWS, wide)) as engine:
        train_engine(engine, 2)
        engine.save_checkpoint(folder, "wide")
        before = everything(engine)["moments"]
    with windlass.initialize(build("Network"), config(stage, ROWS)) as engine:
        engine.load_checkpoint(folder, "wide")
        rounded = everything(engine)["moments"]
        engine.save_checkpoint(folder, "narrow")
    for name, moments in before.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(rounded[name][key], moments[key].bfloat16().float())
            assert rounded[name][key].dtype is torch.float32
    with windlass.initialize(build("Network"), config(stage, ROWS, wide)) as engine:
        engine.load_checkpoint(folder, "narrow")
        assert same_bits(everything(engine)["moments"], rounded)
