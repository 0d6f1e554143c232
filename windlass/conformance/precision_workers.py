"""Workers for level 3 about precision: overflow, master weights, mixed dtypes. Each runs on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import windlass
from windlass.conformance.allocations import bring_number
from windlass.conformance.models import batch, build
from windlass.conformance.training import (
    LR,
    WEIGHT_DECAY,
    assert_equals_oracle,
    config_of,
    distance,
    my_part,
    train_engine,
    windlass_ranks,
)
from windlass.conformance.training_workers import ROWS, part_of, start

FP16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def overflow_on_one_rank(stage: int) -> None:
    """An inf in one rank's gradient: all skip, nothing moves, the scale backs off, and training goes on as if that
    batch had not been."""
    clean = start(stage, fp16=FP16)
    train_engine(clean, 3)
    wanted = clean.full_state_dict()
    clean.close()
    with start(stage, fp16=FP16) as engine:
        train_engine(engine, 2)
        before = engine.full_state_dict()
        moments = engine.full_optimizer_state("head.weight")
        scale, steps, lr = engine.loss_scale, engine.global_steps, engine.lr
        engine.backward(_spoil(engine, engine(*part_of(engine, 2)), engine.num_ranks - 1, float("inf")))
        assert not engine.step()
        assert engine.skipped_steps == 1
        assert (engine.global_steps, engine.lr) == (steps, lr)
        assert engine.loss_scale == scale / 2
        after = engine.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        again = engine.full_optimizer_state("head.weight")
        assert again["step"] == moments["step"]
        assert all(torch.equal(again[key], moments[key]) for key in ("exp_avg", "exp_avg_sq"))
        train_engine(engine, 1, first=2)
        # Halving the loss scale halves every fp16 gradient exactly unless it underflows.
        assert max(distance(engine.full_state_dict(), wanted).values()) < 1e-4


def nonfinite_in_fp32(stage: int) -> None:
    """A NaN in one rank's gradient skips the step on every rank, in fp32 too."""
    with start(stage) as engine:
        train_engine(engine, 1)
        before = engine.full_state_dict()
        engine.backward(_spoil(engine, engine(*part_of(engine, 1)), 0, float("nan")))
        assert not engine.step()
        after = engine.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        train_engine(engine, 2, first=1)
        assert_equals_oracle(engine.full_state_dict(), "Network", 3)


def _spoil(engine: windlass.Engine, loss: Tensor, rank: int, factor: float) -> Tensor:
    """The loss times `factor` on one rank; by a factor that is data, so that every rank runs the same program."""
    return loss * bring_number(engine.accelerator, factor if engine.rank == rank else 1.0)


def low_precision_against_oracle(stage: int, precision: str) -> None:
    """Low-precision weights, fp32 master and moments: each rank's gradients in low precision, summed in fp32."""
    dtype = DTYPES[precision]
    section: dict[str, Any] = {"enabled": True} if precision == "bf16" else {"enabled": True, "initial_scale_power": 6}
    given: dict[str, Any] = {precision: section}
    with start(stage, **given) as engine:
        master = _follow_master_weights(engine, build("Network"), build("Network").to(dtype))
        full = engine.full_state_dict()
        for name, value in engine.module.state_dict().items():
            assert value.dtype is dtype
            assert torch.equal(engine.accelerator.to_host(value), full[name].to(dtype))
        exact = torch.cat([value.flatten() for value in full.values()])
        assert exact.ne(exact.to(dtype).float()).float().mean() > 0.5, (
            "the masters have no more digits than the weights"
        )
        assert max(distance(full, master.state_dict()).values()) < _bound(engine, dtype)


def mixed_dtypes_in_one_module(stage: int) -> None:
    """A bf16 block in an fp32 model keeps a master of its own; an integer buffer stays what it is."""
    with start(stage, "MixedDtypes") as engine:
        master = _follow_master_weights(engine, build("MixedDtypes").float(), build("MixedDtypes"))
        full = engine.full_state_dict()
        assert torch.equal(full.pop("count"), torch.arange(5))
        state = master.state_dict()
        state.pop("count")
        assert max(distance(full, state).values()) < _bound(engine, torch.bfloat16)


def _bound(engine: windlass.Engine, dtype: torch.dtype) -> float:
    """How far weights may be from the oracle's, relative to their size. Where programs are compiled, each program fuses
    operations in its own way, so activations are rounded elsewhere than in the oracle's program: two roundings more."""
    return 2 * torch.finfo(dtype).eps if engine.accelerator.capabilities.lazy else 1e-3


def _follow_master_weights(engine: windlass.Engine, master: nn.Module, low: nn.Module) -> nn.Module:
    """Train the engine and, in plain PyTorch on the same device, `low` with its fp32 `master` on the host; returns the
    master. The operations and precisions are the same: only the order of a few fp32 sums may differ, and flips of a
    rounding that follow."""
    optimizer = torch.optim.AdamW(master.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    scale, accelerator = engine.loss_scale, engine.accelerator
    low = low.to(accelerator.device)
    for step in range(5):
        for parameter in master.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for rank in range(engine.num_ranks):
            x, y = (my_part(t, rank, engine.num_ranks, 0, 1).to(accelerator.device) for t in batch(step, ROWS))
            low.zero_grad()
            (low(x, y) * scale).backward()
            for parameter, other in zip(master.parameters(), low.parameters(), strict=True):
                assert parameter.grad is not None
                assert other.grad is not None
                parameter.grad += accelerator.to_host(other.grad).float() / (scale * engine.num_ranks)
        torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, other in zip(master.parameters(), low.parameters(), strict=True):
                other.copy_(parameter)
        engine.backward(engine(*part_of(engine, step)))
        assert engine.step()
    return master


def refuse_undeclared_precision(precision: str) -> None:
    """Training in a dtype that the device does not have is refused, with what to do instead."""
    config = config_of(1, 1, windlass_ranks(), ROWS, **{precision: {"enabled": True}})
    with pytest.raises(windlass.Unsupported) as caught:
        windlass.initialize(build("Network"), config).close()
    name = str(DTYPES[precision]).removeprefix("torch.")
    assert name in str(caught.value)
