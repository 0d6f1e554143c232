"""AdamW over regions: which stretches of a shard share settings and step count, one kernel call for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.core.plan import Region
from windlass.core.specs import dtype_from_name
from windlass.core.state import EXP_AVG, EXP_AVG_SQ, ModelState


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
    """Elements [start, stop) of a region whose parameters share a group and a step count."""

    start: int
    stop: int
    group: int
    step: int  # of the update that is about to happen, from 1


def find_stretches(region: Region, bounds: tuple[int, int], steps: dict[str, int], touched: set[str]) -> list[Stretch]:
    """Cut the owned part of a region so that every kernel call has one set of scalars.

    Untouched parameters fall between stretches and are left alone. Padding goes with what precedes it.
    """
    stretches: list[Stretch] = []
    for index, placement in enumerate(region.placements):
        following = region.placements[index + 1].start if index + 1 < len(region.placements) else region.numel
        start, stop = max(placement.start, bounds[0]), min(following, bounds[1])
        if placement.name not in touched or start >= stop:
            continue
        step = steps[placement.name] + 1
        last = stretches[-1] if stretches else None
        if last and last.stop == start and (last.group, last.step) == (placement.group, step):
            stretches[-1] = Stretch(last.start, stop, last.group, step)
        else:
            stretches.append(Stretch(start, stop, placement.group, step))
    return stretches


def scalars_for(settings: AdamWSettings, step: int, device: torch.device) -> Tensor:
    """The vector that the kernel reads, laid out as `windlass.accelerator.reference.ADAMW_SCALARS`."""
    beta1, beta2 = settings.betas
    values = (
        settings.lr, beta1, 1 - beta1, beta2, 1 - beta2, settings.eps, settings.weight_decay,
        1 - beta1**step, 1 - beta2**step,
    )  # fmt: skip
    return torch.tensor(values, dtype=torch.float32, device=device)


def update_region(
    state: ModelState,
    region: Region,
    gradient: Tensor,
    groups: Sequence[AdamWSettings],
    touched: set[str],
    gradient_scale: Tensor,
    keep: Tensor,
    scalars: dict[tuple[int, int], Tensor],
) -> None:
    """Update what this rank owns of a region. `gradient` covers `state.owned_bounds(region)`."""
    kernel = state.accelerator.kernels
    bounds = state.owned_bounds(region)
    fp32, weights = state.owned_fp32(region), state.owned_weights(region)
    low = None if dtype_from_name(region.dtype) is torch.float32 else weights
    moments = state.moments[region.name]
    for stretch in find_stretches(region, bounds, state.steps, touched):
        if (stretch.group, stretch.step) not in scalars:
            scalars[stretch.group, stretch.step] = scalars_for(
                groups[stretch.group], stretch.step, state.accelerator.device
            )
        part = slice(stretch.start - bounds[0], stretch.stop - bounds[0])
        given = (fp32[part], moments[EXP_AVG][part], moments[EXP_AVG_SQ][part], None if low is None else low[part])
        results = kernel["adamw"](
            given[0], gradient[part], given[1], given[2], scalars[stretch.group, stretch.step],
            gradient_scale, keep, given[3], decoupled=groups[stretch.group].decoupled,
        )  # fmt: skip
        for destination, result in zip(given, results, strict=True):
            # A kernel may return new tensors instead of having written into what it consumed.
            if destination is not None and result is not destination:
                destination.copy_(result)
