"""Workers for level 3: each runs on every rank. They train on the open device and compare with plain PyTorch."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import windlass
from windlass.accelerator.interface import Accelerator
from windlass.conformance.models import Network, batch, build, loss_of
from windlass.conformance.opening import opened
from windlass.conformance.training import (
    assert_equals_oracle,
    config_of,
    distance,
    my_part,
    train_and_count,
    train_engine,
    train_oracle,
    windlass_ranks,
)

ROWS = 48


def start(
    stage: int, model: str = "Network", accumulation: int = 1, accelerator: Accelerator | None = None, **more: Any
) -> windlass.Engine:
    """An engine on `accelerator`, or on one of its own; `more` is more configuration."""
    config = config_of(stage, accumulation, windlass_ranks(), ROWS, **more)
    return windlass.initialize(build(model), config, accelerator=accelerator)


def part_of(engine: windlass.Engine, step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of one step's batch: (ids, targets), on the host."""
    ids, targets = batch(step, ROWS)
    return my_part(ids, engine.rank, engine.num_ranks, 0, 1), my_part(targets, engine.rank, engine.num_ranks, 0, 1)


def train_cells(
    model: str, stages: list[int], accumulations: list[int], steps: int, more: dict[str, Any] | None = None
) -> dict[tuple[int, int], dict[str, Any]]:
    """Train one model at several stages and accumulations, one after the other on the same device. Of each: the
    weights it came to, its gradient norms, and what its last step and its closing left in the books."""
    results = {}
    with opened() as accelerator:
        for stage in stages:
            for accumulation in accumulations:
                with start(stage, model, accumulation, accelerator, **(more or {})) as engine:
                    result = train_and_count(engine, steps)
                result["left"] = accelerator.memory.stats().used.value
                results[stage, accumulation] = result
    return results


def clip_and_compare(stage: int, limit: float, steps: int) -> None:
    """Gradients longer than `limit` are shortened to it (0: never), as plain PyTorch does."""
    with start(stage, gradient_clipping=limit) as engine:
        norms = train_engine(engine, steps)
        state = engine.full_state_dict()
    assert_equals_oracle(state, "Network", steps, clip=limit)
    if limit > 0:
        assert norms == pytest.approx(train_oracle("Network", steps, clip=limit)[1], rel=1e-5)
        assert min(norms) > limit  # else nothing was clipped


# -- what happens around a step ---------------------------------------------------------------------------------------


def evaluate_between_steps(stage: int, uneven: bool = False) -> None:
    """Evaluation between steps and between micro-batches; `uneven`: more of it on one rank than on another."""
    with start(stage, accumulation=2) as engine:
        for step in range(4):
            ids, targets = batch(step, ROWS)
            for micro in range(2):
                engine.eval()
                with torch.no_grad():
                    for _ in range(engine.rank + micro if uneven else 1 + micro):
                        loss = engine.accelerator.read_host(engine(ids[:5], targets[:5]), tag="evaluation")
                        assert math.isfinite(loss[0])
                engine.train()
                x, y = (my_part(t, engine.rank, engine.num_ranks, micro, 2) for t in (ids, targets))
                engine.backward(engine(x, y))
                engine.step()
        assert_equals_oracle(engine.full_state_dict(), "Network", 4)


class Interrupted(Exception):
    """What a hook raises in the middle of a forward pass."""


def raise_in_forward_then_train(stage: int) -> None:
    """An exception in the middle of forward on all ranks; training goes on as if nothing had been."""
    with start(stage) as engine:
        train_engine(engine, 2)
        block = engine.module.blocks[2]  # type: ignore[index]
        handle = block.norm.register_forward_hook(_interrupt)  # type: ignore[union-attr]
        for _ in range(2):
            with pytest.raises(Interrupted):
                engine(*part_of(engine, 2))
        handle.remove()
        train_engine(engine, 2, first=2)
        assert_equals_oracle(engine.full_state_dict(), "Network", 4)


def _interrupt(*_: object) -> None:
    raise Interrupted


def several_backwards_per_step(stage: int) -> None:
    """Two losses, two backward passes, one step: all of them count, the last one too."""
    with start(stage) as engine:
        for step in range(4):
            x, y = part_of(engine, step)
            (0.5 * engine(x, y)).backward()
            (0.25 * engine(x, y) + 0.25 * engine(x, y)).backward()
            assert engine.step()
        assert_equals_oracle(engine.full_state_dict(), "Network", 4)


def state_dict_in_mid_training(stage: int) -> None:
    """`module.state_dict()` is complete at any time, and loads into a plain model that then computes the same."""
    with start(stage, "Tied") as engine:
        train_engine(engine, 3)
        plain = build("Tied", seed=7)
        plain.load_state_dict(engine.module.state_dict())
        full = engine.full_state_dict()
        assert all(torch.equal(plain.state_dict()[name], full[name]) for name in full)
        x, y = batch(9, ROWS)
        with torch.no_grad():
            (got,) = engine.accelerator.read_host(engine(x, y), tag="evaluation")
            assert got == pytest.approx(float(loss_of(plain(x, y))), rel=1e-5)
        train_engine(engine, 1, first=3)
        assert_equals_oracle(engine.full_state_dict(), "Tied", 4)


def refuse_different_plans() -> None:
    """Ranks with different models hear of it, all of them, before anything is exchanged."""
    layers = 2 + int(os.environ["RANK"])
    with pytest.raises(ValueError, match="rank 0 and rank 1 differ in "):
        windlass.initialize(Network(layers), config_of(1, 1, windlass_ranks(), ROWS))


# -- random numbers ---------------------------------------------------------------------------------------------------


class Dropping(Network):
    """Dropout after every block, recomputed in backward or not."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:

            def drop(value: Tensor, block: nn.Module = block) -> Tensor:
                return nn.functional.dropout(block(value), 0.5)

            x = checkpoint(drop, x, use_reentrant=False) if self.recompute else drop(x)
        return x


def _start_dropping(stage: int, recompute: bool, accelerator: Accelerator) -> windlass.Engine:
    torch.manual_seed(0)
    return windlass.initialize(
        Dropping(recompute), config_of(stage, 1, windlass_ranks(), ROWS), accelerator=accelerator
    )


def seeds_rule_dropout(stage: int) -> None:
    """The same seed trains to the same weights, another seed to others, and a restored state draws again."""
    with opened() as accelerator:
        runs = []
        for seed in (5, 5, 6):
            with _start_dropping(stage, False, accelerator) as engine:
                accelerator.seed(seed + 100 * engine.rank)
                train_engine(engine, 3)
                runs.append(engine.full_state_dict())
        assert max(distance(runs[1], runs[0]).values()) < 1e-6
        assert max(distance(runs[2], runs[0]).values()) > 1e-3
        with _start_dropping(stage, False, accelerator) as engine, torch.no_grad():
            x, y = part_of(engine, 0)
            before = accelerator.rng_state()
            first, second = (accelerator.read_host(engine(x, y), tag="evaluation") for _ in range(2))
            accelerator.set_rng_state(before)
            again = accelerator.read_host(engine(x, y), tag="evaluation")
        assert first == again
        assert first != second


def recomputation_draws_the_same_mask(stage: int) -> None:
    """With activation checkpointing the gradient is that of the forward pass which was seen: plain PyTorch on the
    same device and with the same seeds, without checkpointing, has the same one."""
    with opened() as accelerator, _start_dropping(stage, True, accelerator) as engine:
        torch.manual_seed(0)
        plain = Dropping(False).to(accelerator.device)
        plain.load_state_dict(engine.full_state_dict())
        accelerator.seed(5 + engine.rank)
        engine.backward(engine(*part_of(engine, 0)))
        got = engine.full_gradient("head.weight")
        mean = torch.zeros_like(got)
        for rank in range(engine.num_ranks):
            accelerator.seed(5 + rank)
            x, y = (my_part(t, rank, engine.num_ranks, 0, 1).to(accelerator.device) for t in batch(0, ROWS))
            (gradient,) = torch.autograd.grad(plain(x, y), [plain.head.weight])
            mean += accelerator.to_host(gradient) / engine.num_ranks
        assert torch.allclose(got, mean, rtol=1e-4, atol=1e-7)
        assert engine.step()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def everything(engine: windlass.Engine) -> dict[str, Any]:
    """All that a checkpoint must bring back: weights, moments, counts."""
    names = [name for name, _ in engine.module.named_parameters()]
    return {
        "weights": engine.full_state_dict(),
        "moments": {name: engine.full_optimizer_state(name) for name in names},
        "facts": (engine.global_steps, engine.skipped_steps, engine.loss_scale, engine.lr),
    }


def same_bits(one: Any, other: Any) -> bool:
    """Equal in every bit, through nested dicts of tensors and plain values."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def draw(accelerator: Accelerator) -> Tensor:
    """64 draws of the device's own random numbers, on the host."""
    return accelerator.to_host(torch.nn.functional.dropout(torch.ones(64, device=accelerator.device), 0.5))


def save_after_three_steps(folder: str, stage: int) -> dict[str, Any]:
    """Train, save, and return what was saved and the draws that followed; then two more steps, as "later"."""
    with start(stage, "Tied") as engine:
        train_engine(engine, 3)
        engine.accelerator.seed(11 + engine.rank)
        engine.save_checkpoint(folder, client_state={"epoch": 2})
        result = {"saved": everything(engine), "draws": draw(engine.accelerator)}
        train_engine(engine, 2, first=3)
        return {**result, "later": everything(engine)}


def load_and_continue(folder: str, stage: int) -> dict[str, Any]:
    """Load into other weights than those that were saved; what came, the draws that follow, and two steps more."""
    with start(stage, "Tied") as engine:
        train_engine(engine, 1, first=90)
        assert engine.load_checkpoint(folder) == {"epoch": 2}
        result = {"saved": everything(engine), "draws": draw(engine.accelerator)}
        train_engine(engine, 2, first=3)
        return {**result, "later": everything(engine)}
