"""Muon's update of what this rank holds: blend, find directions, apply. The definition is `muon.update_matrix`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from windlass.core.adamw import AdamWSettings, find_stretches
from windlass.core.captured import Issuer
from windlass.core.kernel_results import keep_results
from windlass.core.muon import (
    MOMENTUM,
    TAG,
    MuonSettings,
    decay_scalars,
    momentum_scalars,
    require_muon,
    update_scale,
)
from windlass.core.muon_exchange import open_directions
from windlass.core.noise_seeds import make_noise_seed
from windlass.core.plan import Region
from windlass.core.specs import dtype_from_name
from windlass.core.state import ModelState

_Part = tuple[int, int, int, float]  # elements [start, stop) of a region, group, scale


class MuonUpdate:
    """One executor's; `apply` is one update. Nothing is changed unless `keep`."""

    def __init__(self, state: ModelState, issuer: Issuer) -> None:
        assert state.plan.muon is not None
        self._state = state
        self._muon = state.plan.muon
        self._issuer = issuer
        self._directions = open_directions(state, issuer)
        self._regions = [region for region in state.plan.regions if region.algorithm == "muon"]
        self._narrow = self._muon.rules.momentum_dtype != "float32"
        self.clips = self._muon.rules.clip == "pre"  # its gradients are clipped as all are
        self._parts: dict[str, list[_Part]] = {}  # of what was touched last
        self._parts_of: set[str] | None = None
        self._inputs: dict[str, Tensor] = {}  # of the update under way, by region
        self._kept: dict[str, Tensor] = {}  # inputs and directions by region, where a captured update finds them again

    def apply(
        self,
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        gradient_scale: Tensor,  # [] fp32
        keep: Tensor,  # [] bool
        gradient_of: Callable[[Region], Tensor],
    ) -> None:
        """Update what was touched. A collective."""
        regions = [region for region in self._regions if any(one.name in touched for one in region.placements)]
        inputs = self._inputs
        for region in regions:
            inputs[region.name] = self._allocate(region)
        keep = self._issuer.keep("keep", keep)
        self._blend(regions, groups, touched, inputs, gradient_scale, keep, gradient_of)
        self._directions.find(inputs, touched)
        self._apply(regions, groups, touched, inputs, keep)
        self._free()

    def close(self) -> None:
        """Give the memory back, also what an update that failed has left."""
        self._directions.close()
        self._free()
        while self._kept:
            self._state.accelerator.memory.release(self._kept.popitem()[1])

    def _allocate(self, region: Region) -> Tensor:
        if region.name in self._kept:
            return self._kept[region.name]
        first, stop = self._state.owned_bounds(region)
        dtype = dtype_from_name(self._muon.rules.direction_dtype)
        made = self._state.accelerator.memory.empty((stop - first,), dtype, tag=TAG)
        if self._state.plan.rules.issue == "captured":
            self._kept[region.name] = made
        return made

    def _free(self) -> None:
        while self._inputs:
            name, tensor = self._inputs.popitem()
            if name not in self._kept:
                self._state.accelerator.memory.release(tensor, after=self._state.accelerator.streams.record())

    # -- before: momentum, and what is to be orthogonalised ----------------------------------------------------

    def _blend(
        self,
        regions: Sequence[Region],
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        inputs: dict[str, Tensor],
        gradient_scale: Tensor,
        keep: Tensor,
        gradient_of: Callable[[Region], Tensor],
    ) -> None:
        tensors, rows, noise = [], [], []
        kinds: dict[int, Tensor] = {}
        for region in regions:
            bounds = self._state.owned_bounds(region)
            vectors = (self._state.moments[region.name][MOMENTUM], gradient_of(region), inputs[region.name])
            for start, stop, group, own_noise in self._find_stretches(region, bounds, touched):
                kinds.setdefault(group, momentum_scalars(require_muon(groups[group])))
                rows.append(list(kinds).index(group))
                tensors += [one[start - bounds[0] : stop - bounds[0]] for one in vectors]
                noise.append(own_noise)
        if not rows:
            return
        given = [
            self._issuer.keep("momentum", torch.stack(list(kinds.values()))),
            self._issuer.keep("gradient scale", gradient_scale),
            keep,
        ]
        if self._narrow:
            given.append(self._issuer.keep("momentum noise", torch.tensor(noise, dtype=torch.int64)))
        self._issuer.run("blend", self._issue_blend, tuple(rows), [*given, *tensors])

    def _find_stretches(
        self, region: Region, bounds: tuple[int, int], touched: set[str]
    ) -> Iterator[tuple[int, int, int, list[int]]]:
        """(start, stop, group, noise) of what this rank holds of touched parameters; one by one where there is noise,
        which goes by the parameter and the element's place in it."""
        if not self._narrow:
            for stretch in find_stretches(region, bounds, self._state.steps, touched):
                yield stretch.start, stretch.stop, stretch.group, [0, 0]
            return
        for one in region.placements:
            start, stop = max(one.start, bounds[0]), min(one.stop, bounds[1])
            if one.name in touched and start < stop:
                seed = make_noise_seed(self._state.plan, one.name)
                count = self._state.steps.next_count(self._state.steps.cohort(one.name))
                yield start, stop, one.group, [seed + int(count), start - one.start]

    def _issue_blend(self, rows: tuple[int, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """A function of its tensors, into which it writes; it may be captured."""
        kernel, supply = self._state.accelerator.kernels, iter(tensors)
        scalars, scale, keep = next(supply), next(supply), next(supply)
        noise = next(supply).unbind() if self._narrow else [None] * len(rows)
        for row, own_noise in zip(rows, noise, strict=True):
            momentum, gradient, blended = next(supply), next(supply), next(supply)
            results = kernel["momentum_blend"](
                momentum, gradient, blended, scalars[row], scale, keep, own_noise, nesterov=self._muon.rules.nesterov
            )
            keep_results((momentum, blended), results)
        return []

    # -- after: scale, decay, apply ----------------------------------------------------------------------------

    def _apply(
        self,
        regions: Sequence[Region],
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        inputs: dict[str, Tensor],
        keep: Tensor,
    ) -> None:
        parts = self._find_parts(touched)
        kinds: dict[tuple[int, float], Tensor] = {}
        tensors, structure = [], []
        for region in regions:
            first, _ = self._state.owned_bounds(region)
            vectors = (self._state.owned_fp32(region), inputs[region.name], self._state.owned_low(region))
            for start, stop, group, scale in parts.get(region.name, ()):
                kinds.setdefault((group, scale), decay_scalars(require_muon(groups[group]), scale))
                here = [one[start - first : stop - first] for one in vectors if one is not None]
                structure.append((list(kinds).index((group, scale)), len(here) == 3))
                tensors += here
        if structure:
            scalars = self._issuer.keep("decay", torch.stack(list(kinds.values())))
            self._issuer.run("scale and decay", self._issue_apply, tuple(structure), [scalars, keep, *tensors])

    def _issue_apply(self, structure: tuple[tuple[int, bool], ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """A function of its tensors, into which it writes; it may be captured."""
        kernel, supply = self._state.accelerator.kernels, iter(tensors)
        scalars, keep = next(supply), next(supply)
        for row, has_low in structure:
            weight, direction = next(supply), next(supply)
            low = next(supply) if has_low else None
            keep_results((weight, low), kernel["scale_decay_update"](weight, direction, scalars[row], keep, low))
        return []

    def _find_parts(self, touched: set[str]) -> dict[str, list[_Part]]:
        """What this rank holds of touched matrices, by region; neighbours of one group and scale in one part. What is
        touched seldom changes."""
        if touched == self._parts_of:
            return self._parts
        found: dict[str, list[_Part]] = {}
        for one in sorted(self._muon.each, key=lambda one: (one.region, one.start)):
            region, placement = self._state.plan.placement_by_name[one.name]
            bounds = self._state.owned_bounds(region)
            start, stop = max(one.start, bounds[0]), min(one.stop, bounds[1])
            if one.name not in touched or start >= stop:
                continue
            own = (placement.group, update_scale(one.rows, one.columns, self._muon.rules.scale))
            parts = found.setdefault(one.region, [])
            if parts and parts[-1][1:] == (start, *own):
                parts[-1] = (parts[-1][0], stop, *own)
            else:
                parts.append((start, stop, *own))
        self._parts_of, self._parts = set(touched), found
        return found
