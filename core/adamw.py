"""AdamW over regions: which parts of a shard share settings and step count, one kernel call for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.core.plan import Region
from windlass.core.state import EXP_AVG, EXP_AVG_SQ, ModelState
from windlass.core.step_counts import StepCounts

_Given = tuple[Tensor | None, ...]  # weight fp32, exp_avg, exp_avg_sq, low-precision weight or None


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
    """Cut the owned part of a region so that every kernel call has one set of scalars.

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


def scalars_for(settings: AdamWSettings, step: int, device: torch.device) -> Tensor:
    """The vector that the kernel reads, laid out as `windlass.accelerator.reference.ADAMW_SCALARS`."""
    beta1, beta2 = settings.betas
    values = (*_constants(settings), 1 - beta1**step, 1 - beta2**step)
    return torch.tensor(values, dtype=torch.float32).to(device)


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


class Update:
    """One AdamW update of what this rank owns, region by region."""

    def __init__(
        self,
        state: ModelState,
        groups: Sequence[AdamWSettings],
        touched: set[str],
        gradient_scale: Tensor,
        keep: Tensor,
    ) -> None:
        self._state = state
        self._groups = groups
        self._touched = touched
        self._gradient_scale = gradient_scale
        self._keep = keep
        self._scalars: dict[tuple[int, int], Tensor] = {}  # by group and cohort

    def apply(self, region: Region, gradient: Tensor) -> None:
        """Update one region. `gradient` covers `state.owned_bounds(region)`."""
        state, moments = self._state, self._state.moments[region.name]
        given = (state.owned_fp32(region), moments[EXP_AVG], moments[EXP_AVG_SQ], state.owned_low(region))
        if state.plan.rules.program == "uniform":
            self._select(region, gradient, given)
            return
        bounds = state.owned_bounds(region)
        for stretch in find_stretches(region, bounds, state.steps, self._touched):
            part = slice(stretch.start - bounds[0], stretch.stop - bounds[0])
            whole = (stretch.start, stretch.stop) == bounds
            parts = given if whole else tuple(None if one is None else one[part] for one in given)
            results = self._call(stretch.group, stretch.cohort, gradient if whole else gradient[part], parts)
            _write(parts, results)

    def _select(self, region: Region, gradient: Tensor, given: _Given) -> None:
        """Where programs must be equal on all ranks: a call over all of the owned part for each group and cohort, from
        which a mask takes what it is for. Most regions have one of each, and need no mask."""
        placements = [(one, (one.group, self._state.steps.cohort(one.name))) for one in region.placements]
        kinds = sorted({kind for one, kind in placements if one.name in self._touched})
        untouched = [one for one in region.placements if one.name not in self._touched and one.numel]
        if len(kinds) == 1 and not untouched:
            _write(given, self._call(*kinds[0], gradient, given))
            return
        selected: _Given = given
        names = [frozenset(one.name for one, own in placements if own == kind) & self._touched for kind in kinds]
        for kind, mask in zip(kinds, self._state.masks(region, names), strict=True):
            results = self._call(*kind, gradient, tuple(None if one is None else one.clone() for one in given))
            selected = tuple(
                None if before is None or after is None else torch.where(mask, after, before)
                for before, after in zip(selected, results, strict=True)
            )
        _write(given, selected)

    def _call(self, group: int, cohort: int, gradient: Tensor, given: _Given) -> _Given:
        settings = self._groups[group]
        if (group, cohort) not in self._scalars:
            step = self._state.steps.next_count(cohort)
            self._scalars[group, cohort] = (
                scalars_on_device(settings, step)
                if isinstance(step, Tensor)
                else scalars_for(settings, step, self._state.accelerator.device)
            )
        weight, exp_avg, exp_avg_sq, low = given
        results: _Given = self._state.accelerator.kernels["adamw"](
            weight, gradient, exp_avg, exp_avg_sq, self._scalars[group, cohort],
            self._gradient_scale, self._keep, low, decoupled=settings.decoupled,
        )  # fmt: skip
        return results


def _write(given: _Given, results: _Given) -> None:
    """A kernel may return new tensors instead of having written into what it consumed."""
    for destination, result in zip(given, results, strict=True):
        if destination is not None and result is not None and result is not destination:
            destination.copy_(result)
