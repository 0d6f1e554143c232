"""AdamW's settings, the numbers that its kernels read, and which parts of a shard share them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.core.plan import Region
from windlass.core.step_counts import StepCounts


@dataclass(frozen=True)
class AdamWSettings:
    """One parameter group's hyper-parameters, as in torch.optim.AdamW. Not `decoupled`: Adam with L2."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decoupled: bool = True


@dataclass(frozen=True)
class Stretch:
    """Elements [start, stop) of a region whose parameters share a group and a count of updates."""

    start: int
    stop: int
    group: int
    cohort: int  # see `step_counts`


def find_stretches(region: Region, bounds: tuple[int, int], counts: StepCounts, touched: set[str]) -> list[Stretch]:
    """Cut the owned part of a region so that every stretch has one set of scalars.

    Untouched parameters fall between stretches and are left alone. Padding goes with what precedes it.
    """
    stretches: list[Stretch] = []
    for index, placement in enumerate(region.placements):
        following = region.placements[index + 1].start if index + 1 < len(region.placements) else region.numel
        start, stop = max(placement.start, bounds[0]), min(following, bounds[1])
        if placement.name not in touched or start >= stop:
            continue
        cohort = counts.cohort(placement.name)
        last = stretches[-1] if stretches else None
        if last and last.stop == start and (last.group, last.cohort) == (placement.group, cohort):
            stretches[-1] = Stretch(last.start, stop, last.group, cohort)
        else:
            stretches.append(Stretch(start, stop, placement.group, cohort))
    return stretches


def scalars_for(settings: AdamWSettings, step: int) -> Tensor:
    """The vector that the kernel reads, laid out as `windlass.accelerator.reference.ADAMW_SCALARS`, on the host."""
    beta1, beta2 = settings.betas
    return torch.tensor((*_constants(settings), 1 - beta1**step, 1 - beta2**step), dtype=torch.float32)


def scalars_on_device(settings: AdamWSettings, step: Tensor) -> Tensor:
    """The same where only the device knows the count `step` [] fp32: 1 - beta^step = -expm1(step * log beta), which
    loses no digits. A new learning rate is new data in the same program."""
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in settings.betas)
    values = torch.tensor((*_constants(settings), *logs), dtype=torch.float32).to(step.device)
    constants = len(values) - 2
    return torch.cat([values[:constants], -torch.expm1(values[constants:] * step)])


def _constants(settings: AdamWSettings) -> tuple[float, ...]:
    beta1, beta2 = settings.betas
    return settings.lr, beta1, 1 - beta1, beta2, 1 - beta2, settings.eps, settings.weight_decay
