"""The update of what this rank owns: all of it in one kernel call, or, where programs are uniform, region by region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.core.adamw import AdamWSettings, Stretch, find_stretches, scalars_for, scalars_on_device
from windlass.core.captured import Issuer
from windlass.core.kernel_results import keep_results
from windlass.core.muon import MuonSettings
from windlass.core.noise_seeds import make_noise_seed
from windlass.core.plan import Region
from windlass.core.state import EXP_AVG, EXP_AVG_SQ, ModelState

_Given = tuple[Tensor, Tensor, Tensor, Tensor | None]  # weight fp32, exp_avg, exp_avg_sq, low-precision weight or None


@dataclass(frozen=True)
class _Call:
    """One call of a kernel for many parts: what is the same in every step."""

    decoupled: bool
    rows: tuple[int, ...]  # of the scalars, one for each part
    with_low: tuple[bool, ...]


class Update:
    """One update; `gradient_of` gives the gradient of `state.owned_bounds(region)`."""

    def __init__(
        self,
        state: ModelState,
        issuer: Issuer,
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        gradient_scale: Tensor,
        keep: Tensor,
    ) -> None:
        self._state = state
        self._issuer = issuer
        self._groups = groups
        self._touched = touched
        self._gradient_scale = gradient_scale
        self._keep = keep
        self._regions = [one for one in state.plan.regions if one.trainable and one.algorithm == "adamw"]
        self._narrow = state.plan.moment_dtype != "float32"
        self._scalars: dict[tuple[int, int], Tensor] = {}  # by group and cohort, where programs are uniform

    def apply(self, gradient_of: Callable[[Region], Tensor]) -> None:
        """Update everything that was touched."""
        if self._state.plan.rules.program == "uniform":
            for region in self._regions:
                self._select(region, gradient_of(region), self._given(region))
        else:
            self._update_stretches(gradient_of)

    def _settings(self, group: int) -> AdamWSettings:
        settings = self._groups[group]
        if not isinstance(settings, AdamWSettings):
            raise TypeError(
                f"parameter group {group} has the settings of another algorithm, but AdamW updates its members"
            )
        return settings

    def _given(self, region: Region) -> _Given:
        moments = self._state.moments[region.name]
        return self._state.owned_fp32(region), moments[EXP_AVG], moments[EXP_AVG_SQ], self._state.owned_low(region)

    # -- where ranks may run different programs ----------------------------------------------------------------

    def _update_stretches(self, gradient_of: Callable[[Region], Tensor]) -> None:
        """The stretches of all regions in one call, their numbers in one vector that goes to the device once."""
        found = [
            (region, stretch)
            for region in self._regions
            for stretch in find_stretches(region, self._state.owned_bounds(region), self._state.steps, self._touched)
        ]
        # one call for each of both, the order within kept
        found.sort(key=lambda one: not self._settings(one[1].group).decoupled)
        if not found:
            return
        kinds = list(dict.fromkeys((stretch.group, stretch.cohort) for _, stretch in found))
        counts = [self._count(cohort) for _, cohort in kinds]
        scalars = torch.stack(
            [scalars_for(self._settings(kind[0]), count) for kind, count in zip(kinds, counts, strict=True)]
        )
        tensors = [
            self._issuer.keep("scalars", scalars),
            self._issuer.keep("gradient scale", self._gradient_scale),
            self._issuer.keep("keep", self._keep),
        ]
        if self._narrow:
            noise = [
                [make_noise_seed(self._state.plan, region.name) + self._count(stretch.cohort), stretch.start]
                for region, stretch in found
            ]
            tensors.append(self._issuer.keep("noise", torch.tensor(noise, dtype=torch.int64)))
        structure = []
        for decoupled in (True, False):
            chosen = [one for one in found if self._settings(one[1].group).decoupled == decoupled]
            parts = [self._part(region, stretch, gradient_of(region)) for region, stretch in chosen]
            rows = tuple(kinds.index((stretch.group, stretch.cohort)) for _, stretch in chosen)
            if parts:
                structure.append(_Call(decoupled, rows, tuple(part[-1] is not None for part in parts)))
                tensors += [one for part in parts for one in part if one is not None]
        self._issuer.run("update", self._issue, tuple(structure), tensors)

    def _count(self, cohort: int) -> int:
        """The count that a good step leads to, which the host knows."""
        count = self._state.steps.next_count(cohort)
        assert isinstance(count, int)
        return count

    def _part(self, region: Region, stretch: Stretch, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient, weight, moments and low-precision weight of a stretch."""
        first, stop = self._state.owned_bounds(region)
        tensors = (gradient, *self._given(region))
        if (stretch.start, stretch.stop) == (first, stop):
            return tensors
        part = slice(stretch.start - first, stretch.stop - first)
        return tuple(None if one is None else one[part] for one in tensors)

    def _issue(self, structure: tuple[_Call, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The update as a function of its tensors, into which it writes; it may be captured."""
        kernels, supply = self._state.accelerator.kernels, iter(tensors)
        scalars, scale, keep = next(supply), next(supply), next(supply)
        noise = next(supply).unbind() if self._narrow else ()
        done = 0
        for call in structure:
            parts: list[tuple[Tensor, _Given]] = []
            for with_low in call.with_low:
                gradient, weight, exp_avg, exp_avg_sq = (next(supply) for _ in range(4))
                parts.append((gradient, (weight, exp_avg, exp_avg_sq, next(supply) if with_low else None)))
            if self._narrow:
                own_noise = noise[done : done + len(parts)]
                for (gradient, given), row, own in zip(parts, call.rows, own_noise, strict=True):
                    weight, exp_avg, exp_avg_sq, low = given
                    vectors = (weight, gradient, exp_avg, exp_avg_sq, scalars[row], scale, keep, low, own)
                    keep_results(given, kernels["adamw_bf16_moments"](*vectors, decoupled=call.decoupled))
            else:
                many = [(given[0], gradient, *given[1:]) for gradient, given in parts]
                results = kernels["adamw_many"](many, scalars, call.rows, scale, keep, decoupled=call.decoupled)
                for (_, given), result in zip(parts, results, strict=True):
                    keep_results(given, result)
            done += len(parts)
        return []

    # -- where programs must be equal on all ranks -------------------------------------------------------------

    def _select(self, region: Region, gradient: Tensor, given: _Given) -> None:
        """A call over all of the owned part for each group and cohort, from which a mask takes what it is for. Most
        regions have one of each, and need no mask."""
        placements = [(one, (one.group, self._state.steps.cohort(one.name))) for one in region.placements]
        kinds = sorted({kind for one, kind in placements if one.name in self._touched})
        untouched = [one for one in region.placements if one.name not in self._touched and one.numel]
        if len(kinds) == 1 and not untouched:
            keep_results(given, self._call(*kinds[0], region, gradient, given))
            return
        selected = given
        ranges = [
            tuple((one.start, one.stop) for one, own in placements if own == kind and one.name in self._touched)
            for kind in kinds
        ]
        for kind, mask in zip(kinds, self._state.masks(region, "update", ranges), strict=True):
            weight, exp_avg, exp_avg_sq, low = given
            copies = (weight.clone(), exp_avg.clone(), exp_avg_sq.clone(), None if low is None else low.clone())
            after = self._call(*kind, region, gradient, copies)
            selected = _choose(mask, after, selected)
        keep_results(given, selected)

    def _call(self, group: int, cohort: int, region: Region, gradient: Tensor, given: _Given) -> _Given:
        state, settings = self._state, self._settings(group)
        count = state.steps.next_count(cohort)
        assert isinstance(count, Tensor)
        if (group, cohort) not in self._scalars:
            self._scalars[group, cohort] = scalars_on_device(settings, count)
        weight, exp_avg, exp_avg_sq, low = given
        vectors = (
            weight, gradient, exp_avg, exp_avg_sq, self._scalars[group, cohort], self._gradient_scale, self._keep, low,
        )  # fmt: skip
        kernels = state.accelerator.kernels
        results: _Given
        if not self._narrow:
            results = kernels["adamw"](*vectors, decoupled=settings.decoupled)
            return results
        seed = make_noise_seed(state.plan, region.name)
        # Where the owned part begins depends on the rank, so it is data and no part of the program.
        place = torch.tensor([seed, state.owned_bounds(region)[0]], dtype=torch.int64).to(count.device)
        noise = torch.stack([place[0] + count.to(torch.int64), place[1]])
        results = kernels["adamw_bf16_moments"](*vectors, noise, decoupled=settings.decoupled)
        return results


def _choose(mask: Tensor, after: _Given, before: _Given) -> _Given:
    """After where the mask is true, before elsewhere."""
    (weight, exp_avg, exp_avg_sq, low), old = after, before
    chosen = [torch.where(mask, new, one) for new, one in zip((weight, exp_avg, exp_avg_sq), old[:3], strict=True)]
    return chosen[0], chosen[1], chosen[2], None if low is None or old[3] is None else torch.where(mask, low, old[3])
