"""Workers for tests/ranks/test_muon_invariance.py and test_muon_precision.py: what must make no difference to Muon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import windlass
from muon_models import Given, WholeNumbers, build
from muon_workers import PolarCount, costs
from windlass.conformance.models import batch
from windlass.conformance.opening import opened
from windlass.conformance.training import my_part

STEPS = 2
MICRO_ROWS = 8  # of a rank in one step


def config_of(stage: int, rows: int, muon: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": rows,
        "optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}},
        "muon": {"ns_dtype": "fp32", **(muon or {})},
        "zero_optimization": {"stage": stage},
        **more,
    }


def split_batches(model: str, stages: Sequence[int]) -> dict[tuple[int, int], tuple[dict[str, Tensor], int, int]]:
    """By stage and micro-batches per step: weights, and how many matrices were orthogonalised here of how many."""
    results = {}
    with opened() as accelerator:
        count, size = PolarCount(accelerator), accelerator.collectives.world.size
        for stage in stages:
            for accumulation in (1, 2, 4, 8):
                config = config_of(stage, MICRO_ROWS * size, gradient_accumulation_steps=accumulation)
                before = count.matrices
                with costs(), windlass.initialize(build(model), config, accelerator=accelerator) as engine:
                    for step in range(STEPS):
                        parts = batch(step, MICRO_ROWS * size)
                        for micro in range(accumulation):
                            x, y = (my_part(t, engine.rank, size, micro, accumulation) for t in parts)
                            engine.backward(engine(x, y))
                            engine.step()
                    assert engine.plan.muon is not None
                    wanted = engine.plan.muon.count * STEPS
                    results[stage, accumulation] = (engine.full_state_dict(), count.matrices - before, wanted)
    return results


def _train_whole_numbers(engine: windlass.Engine, steps: int) -> dict[str, Tensor]:
    for step in range(steps):
        x, signs = (my_part(t, engine.rank, engine.num_ranks, 0, 1) for t in WholeNumbers.batch_of(step))
        engine.backward(engine(x, signs))
        assert engine.step()
    names = [name for name, one in engine.module.named_parameters() if one.dim() == 2]
    momenta = {f"momentum of {name}": engine.full_optimizer_state(name)["momentum"] for name in names}
    return {**engine.full_state_dict(), **momenta}


def scale_losses(stage: int) -> dict[float, dict[str, Tensor]]:
    """fp16 by loss scale. The gradients are exact at each of them."""
    results = {}
    with opened() as accelerator:
        for scale in (1.0, 2.0**8, 2.0**14):
            torch.manual_seed(0)
            config = config_of(stage, 16, fp16={"enabled": True, "loss_scale": scale}, gradient_clipping=0.1)
            with costs(), windlass.initialize(WholeNumbers(), config, accelerator=accelerator) as engine:
                results[scale] = _train_whole_numbers(engine, 3)
    return results


def narrow_momenta(stages: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Momentum in bf16, by stage. One step at stage 0: -1 with momentum in fp32, -2 in bf16, -3 in bf16 with
    another seed."""
    results = {}
    cases = [*((stage, "bf16", 1) for stage in stages), (-1, "fp32", 1), (-2, "bf16", 1), (-3, "bf16", 2)]
    with opened() as accelerator:
        for stage, dtype, seed in cases:
            torch.manual_seed(0)
            given = config_of(max(stage, 0), 16, {"momentum_dtype": dtype}, bf16={"enabled": True}, seed=seed)
            with costs(), windlass.initialize(WholeNumbers(), given, accelerator=accelerator) as engine:
                results[stage] = _train_whole_numbers(engine, 4 if stage >= 0 else 1)
    return results


def overflow_once(stage: int) -> list[str]:
    """fp16 with a dynamic loss scale: a step with inf on one rank leaves every bit, and orthogonalises nothing."""
    problems = []
    config = config_of(stage, 16, fp16={"enabled": True, "initial_scale_power": 6, "hysteresis": 1})
    with opened() as accelerator:
        count = PolarCount(accelerator)
        torch.manual_seed(0)
        with costs(), windlass.initialize(WholeNumbers(), config, accelerator=accelerator) as engine:
            before = _train_whole_numbers(engine, 2)
            matrices, scale = count.matrices, engine.loss_scale
            x, signs = (my_part(t, engine.rank, engine.num_ranks, 0, 1) for t in WholeNumbers.batch_of(9))
            loss = engine(x, signs)
            engine.backward(loss * math.inf if engine.rank == engine.num_ranks - 1 else loss)
            if engine.step() or engine.skipped_steps != 1 or engine.loss_scale != scale / 2:
                problems.append("the step was not skipped")
            if count.matrices != matrices:
                problems.append("a void step was orthogonalised")
            after = _train_whole_numbers(engine, 0)
            problems += [f"{name} has changed" for name in before if not torch.equal(before[name], after[name])]
            later = _train_whole_numbers(engine, 1)
            problems += [f"{name} is not finite" for name, one in later.items() if not torch.isfinite(one).all()]
            if all(torch.equal(after[name], later[name]) for name in after):
                problems.append("training has ended")
    return problems


def give_gradients(stage: int, gradients: Sequence[Tensor], **more: Any) -> list[Tensor]:
    """One step of these gradients at a learning rate of 1, from weights of zero: what it makes of them."""
    params = {"type": "Muon", "params": {"lr": 1.0, "weight_decay": 0.0}}
    with opened() as accelerator:
        size = accelerator.collectives.world.size
        config = config_of(stage, size, optimizer=params, gradient_clipping=1.0, **more)
        model = Given([(one.shape[0], one.shape[1]) for one in gradients])
        with windlass.initialize(model, config, accelerator=accelerator) as engine:
            engine.backward(engine(list(gradients)))
            assert engine.step()
            state = engine.full_state_dict()
            return [state[f"blocks.{index}.weight"] for index in range(len(gradients))]


def measure_update_sizes(stage: int, widths: Sequence[int], coefficients: str) -> list[float]:
    """The root mean square of what a step adds to a weight [width, width], in units of the learning rate."""
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(width, width, generator=generator) for width in widths]
    moved = give_gradients(stage, gradients, muon={"coefficients": coefficients, "ns_dtype": "fp32"})
    return [float(one.square().mean().sqrt()) for one in moved]


def scale_gradients(stage: int) -> list[str]:
    """From 1e-12 to 1e18, beyond which fp32 has no squares for the norm; with zeros and a matrix of rank one beside."""
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(24, 40, generator=generator)
    one = torch.outer(torch.linspace(-1, 1, 16), torch.linspace(1, 2, 16))
    wanted, problems = give_gradients(stage, [full, one, torch.zeros(8, 8)]), []
    for factor in (1e-12, 1e-6, 1e6, 1e17):
        got = give_gradients(stage, [full * factor, one * factor, torch.zeros(8, 8)])
        for index, bound in ((0, 1e-4), (1, 2e-3)):  # rank one: the rounding of the input is lifted beside it
            far = float((got[index] - wanted[index]).norm() / wanted[index].norm())
            if not far < bound:
                problems.append(f"matrix {index} at {factor:g} is {far:.1e} away")
        if got[2].any():
            problems.append(f"zeros have moved at {factor:g}")
    return problems
