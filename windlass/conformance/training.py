"""Train small models on ranks, and the oracle: plain PyTorch, one process, the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import windlass
from windlass.accelerator.interface import Accelerator
from windlass.conformance.models import batch, build, loss_of

LR, WEIGHT_DECAY = 1e-2, 0.05


def config_of(stage: int, accumulation: int, ranks: int, rows: int = 48, **more: Any) -> dict[str, Any]:
    """A configuration whose global batch is `rows`."""
    return {
        "train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": WEIGHT_DECAY}},
        "zero_optimization": {"stage": stage},
        **more,
    }


def my_part(tensor: Tensor, rank: int, ranks: int, micro: int, accumulation: int) -> Tensor:
    """Rows of one micro-step on one rank, contiguous."""
    return tensor.chunk(accumulation)[micro].chunk(ranks)[rank]


def train_engine(
    engine: windlass.Engine, steps: int, rows: int = 48, first: int = 0, plain: bool = False
) -> list[float]:
    """Run optimizer steps; returns the gradient norms. `plain`: by loss.backward()."""
    accumulation = engine.config.gradient_accumulation_steps
    norms = []
    for step in range(first, first + steps):
        ids, targets = batch(step, rows)
        for micro in range(accumulation):
            x, y = (my_part(t, engine.rank, engine.num_ranks, micro, accumulation) for t in (ids, targets))
            loss = loss_of(engine(x, y))
            if plain:
                (loss / accumulation).backward()
            else:
                engine.backward(loss)
            updated = engine.step()
            assert bool(updated) == (micro == accumulation - 1)
        assert engine.grad_norm is not None
        norms.append(engine.grad_norm)
    return norms


def train_grid(
    model: str,
    stages: list[int],
    accumulations: list[int],
    steps: int,
    plain: bool = False,
    accelerator: Accelerator | None = None,  # None: the one that the environment names
) -> dict[tuple[int, int], dict[str, Any]]:
    """Train one model at several stages and accumulations; what each came to, and what was counted."""
    results = {}
    accelerator = accelerator or windlass.open_accelerator()
    for stage in stages:
        for accumulation in accumulations:
            ranks = windlass_ranks()
            config = config_of(stage, accumulation, ranks)
            with windlass.initialize(build(model), config, accelerator=accelerator) as engine:
                results[stage, accumulation] = train_and_count(engine, steps, plain)
            assert accelerator.memory.stats().used.value == 0
    accelerator.close()
    return results


def train_and_count(engine: windlass.Engine, steps: int, plain: bool = False) -> dict[str, Any]:
    """Train; the weights and norms it came to, and what its last step left in the books beside what was planned."""
    counters, prediction, residency = engine.accelerator.counters, engine.plan.prediction, engine.executor.residency
    norms = train_engine(engine, steps - 1, plain=plain)
    counters.reset()
    norms += train_engine(engine, 1, first=steps - 1, plain=plain)
    return {
        "norms": norms,
        "measured": {key: (tally.calls, tally.bytes) for key, tally in counters.collectives.items()},
        "predicted": prediction.step(engine.config.gradient_accumulation_steps),
        "host_reads": counters.host_reads,
        "by_tag": engine.accelerator.memory.stats().by_tag,
        "persistent": dict(prediction.persistent),
        "extra_slots": 0 if residency is None else residency.extra_slots,
        "state": engine.full_state_dict(),
    }


def windlass_ranks() -> int:
    from windlass.accelerator.environment import read_environment

    return read_environment().num_ranks


def train_oracle(
    model: str,
    steps: int,
    rows: int = 48,
    clip: float = 1.0,
    ranks: int = 1,
    accumulation: int = 1,
    exact: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    """Plain PyTorch on the same batches. A model that branches on its input sees each rank's rows apart.

    `exact`: in double precision, to tell rounding noise from error. AdamW divides gradients by their own size, so an
    element whose gradient nearly cancels turns noise of 1e-9 into steps of 1e-6, in plain PyTorch as anywhere.
    """
    module = build(model)
    if exact:
        module = module.double()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY)
    norms = []
    for step in range(steps):
        ids, targets = batch(step, rows)
        for micro in range(accumulation):
            for rank in range(ranks):
                x, y = (my_part(t, rank, ranks, micro, accumulation) for t in (ids, targets))
                (loss_of(module(x, y)) / (ranks * accumulation)).backward()
        if clip > 0:
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip)))
        optimizer.step()
        optimizer.zero_grad()
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.detach().clone() for name, value in state.items()}, norms


def assert_equals_oracle(state: dict[str, Tensor], model: str, steps: int, **split: Any) -> list[float]:
    """Within 1e-6 of plain PyTorch, or as close to the exact result as plain PyTorch is. Returns the oracle's norms."""
    plain, norms = train_oracle(model, steps, **split)
    exact, _ = train_oracle(model, steps, exact=True, **split)
    noise, error, apart = distance(plain, exact), distance(state, exact), distance(state, plain)
    for name, far in apart.items():
        assert far < 1e-6 or error[name] < 2 * noise[name], (name, far, error[name], noise[name])
    return norms


def distance(state: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance per tensor, by norm."""
    assert set(state) == set(oracle)
    result = {}
    for name, want in oracle.items():
        if not want.is_floating_point():
            assert torch.equal(state[name], want), name
            continue
        got = state[name]
        assert got.shape == want.shape, name
        scale = float(want.double().norm()) or 1.0
        result[name] = float((got.double() - want.double()).norm()) / scale
    return result
