"""Muon's update where every rank runs one program: blend, find directions, apply, region by region.

[Note: one program] Nothing that a rank does depends on its number: slices are those of every rank, and where ranks
differ, tables, masks and seeds, which are data, say what is whose. Nothing depends on values either: where a step is
skipped, everything runs with `keep` false, and orthogonalises zeros. So it does for parameters without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from windlass.core.adamw import AdamWSettings
from windlass.core.muon import (
    MOMENTUM,
    TAG,
    MuonSettings,
    decay_scalars,
    momentum_scalars,
    require_muon,
    update_scale,
)
from windlass.core.muon_parts import Found, Kind, Part, Vectors, cut_alike, mask_apart, run_parts
from windlass.core.muon_plan import Matrix
from windlass.core.muon_stacks import StackedDirections
from windlass.core.noise_seeds import make_noise_seed
from windlass.core.plan import Region
from windlass.core.specs import dtype_from_name
from windlass.core.state import ModelState

_Rows = Mapping[Kind, Tensor]  # the numbers that a kernel reads, by kind


@dataclass(frozen=True)
class _Seeds:
    """Of the noise of each part: data, for ranks hold different parameters at one place."""

    cohorts: tuple[int, ...]  # of the parameters that were touched
    key: tuple[tuple[int, int, int], ...]
    values: Tensor  # [parts, 2] int64: seed before the count of updates, and the first element's place in the parameter
    rows: Tensor  # [parts] int32: which of the cohorts


class UniformMuonUpdate:
    """One executor's; `apply` is one update. Nothing is changed unless `keep`."""

    def __init__(self, state: ModelState) -> None:
        assert state.plan.muon is not None
        self._state = state
        self._muon = state.plan.muon
        self._directions = StackedDirections(state)
        self._regions = [region for region in state.plan.regions if region.algorithm == "muon"]
        self._narrow = self._muon.rules.momentum_dtype != "float32"
        self.clips = self._muon.rules.clip == "pre"  # its gradients are clipped as all are
        self._matrices: dict[str, list[Matrix]] = {region.name: [] for region in self._regions}
        for one in self._muon.each:
            self._matrices[one.region].append(one)
        self._parts: dict[tuple[str, str], tuple[frozenset[str], list[Part]]] = {}  # by use and region: for which names
        self._seeds: dict[str, _Seeds] = {}  # by region

    def apply(
        self,
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        gradient_scale: Tensor,  # [] fp32
        keep: Tensor,  # [] bool
        gradient_of: Callable[[Region], Tensor],
    ) -> None:
        """Update what was touched. A collective, on ranks that have touched nothing too."""
        memory, streams = self._state.accelerator.memory, self._state.accelerator.streams
        dtype = dtype_from_name(self._muon.rules.direction_dtype)
        inputs = {one.name: memory.empty((self._held(one),), dtype, tag=TAG).zero_() for one in self._regions}
        self._blend(groups, touched, inputs, gradient_scale, keep, gradient_of)
        directions = self._directions.find(inputs)
        self._apply(groups, touched, directions, keep)
        for tensor in inputs.values():
            memory.release(tensor, after=streams.record())

    def close(self) -> None:
        """Nothing is held that needs to be given back."""

    # -- before: momentum, and what is to be orthogonalised ----------------------------------------------------

    def _blend(
        self,
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        inputs: Mapping[str, Tensor],
        gradient_scale: Tensor,
        keep: Tensor,
        gradient_of: Callable[[Region], Tensor],
    ) -> None:
        cut = self._cut_noisy if self._narrow else self._cut_groups
        planned = {region.name: self._plan_parts("blend", region, touched, cut) for region in self._regions}
        kinds = list(dict.fromkeys((group, None) for group, _ in _find_kinds(planned)))
        rows = self._send_rows(kinds, [momentum_scalars(require_muon(groups[group])) for group, _ in kinds])
        kernel = partial(self._state.accelerator.kernels["momentum_blend"], nesterov=self._muon.rules.nesterov)

        def call(parts: Sequence[Part], noise: Tensor | None, index: int, vectors: Vectors) -> Sequence[Tensor | None]:
            own_noise = None if noise is None else noise[index]
            row = rows[_kind(parts[index])[0], None]
            results: tuple[Tensor, Tensor] = kernel(*vectors, row, gradient_scale, keep, own_noise)
            return results

        for region in self._regions:
            parts = planned[region.name]
            if any(part.kind is not None for part in parts):
                noise = self._make_noise(region, parts, touched) if self._narrow else None
                vectors = [self._state.moments[region.name][MOMENTUM], gradient_of(region), inputs[region.name]]
                run_parts(self._state, region, "blend", parts, vectors, (0, 2), partial(call, parts, noise))

    def _cut_groups(self, region: Region, touched: set[str]) -> list[Part]:
        """By group: what a group is updated with is the same for all of it."""
        found: list[Found] = [
            (one.start, one.stop, (one.group, None) if one.name in touched else None) for one in region.placements
        ]
        return self._cut(region, found)

    def _cut_noisy(self, region: Region, touched: set[str]) -> list[Part]:
        """By parameter: noise goes by the parameter and the element's place in it. A slice needs one seed, which is
        another on each rank, and one place of the parameter's beginning, which must be the same."""
        held, found = self._held(region), list[Found]()
        for one in region.placements:
            for first in range(one.start // held * held, one.stop, held):
                kind = (one.group, one.start - first) if one.name in touched else None
                found.append((max(one.start, first), min(one.stop, first + held), kind))
        parts = cut_alike(found, held)
        if parts is not None:
            return parts
        return mask_apart(
            [
                (one.start, one.stop, (one.group, one.name) if one.name in touched else None)
                for one in region.placements
                if one.numel
            ],
            held,
        )

    def _make_noise(self, region: Region, parts: Sequence[Part], touched: set[str]) -> Tensor:
        """[parts, 2] int64 on the device."""
        steps, device = self._state.steps, self._state.accelerator.device
        first, _ = self._state.owned_bounds(region)
        cohorts = tuple(sorted({steps.cohort(one.name) for one in region.placements if one.name in touched}))
        known = {one.name: one for one in region.placements} | {one.start - first: one for one in region.placements}
        key = []
        for part in parts:
            one = None if part.kind is None else known.get(part.kind[1])  # type: ignore[call-overload]
            if one is None or one.name not in touched:
                key.append((0, 0, 0))  # padding here, a parameter on another rank; or to be left alone
            else:
                seed = make_noise_seed(self._state.plan, one.name)
                key.append((seed, first + part.start - one.start, cohorts.index(steps.cohort(one.name))))
        seeds = self._seeds.get(region.name)
        if seeds is None or (seeds.cohorts, seeds.key) != (cohorts, tuple(key)):
            values = torch.tensor([[seed, place] for seed, place, _ in key], dtype=torch.int64)
            rows = torch.tensor([row for *_, row in key], dtype=torch.int32)
            seeds = _Seeds(cohorts, tuple(key), values.to(device), rows.to(device))
            self._seeds[region.name] = seeds
        counts = torch.stack([torch.as_tensor(steps.next_count(cohort)) for cohort in cohorts])
        own = counts.index_select(0, seeds.rows).to(torch.int64)
        return torch.stack([seeds.values[:, 0] + own, seeds.values[:, 1]], dim=1)

    # -- after: scale, decay, apply ----------------------------------------------------------------------------

    def _apply(
        self,
        groups: Sequence[AdamWSettings | MuonSettings],
        touched: set[str],
        directions: Mapping[str, Tensor],
        keep: Tensor,
    ) -> None:
        planned = {
            region.name: self._plan_parts("apply", region, touched, self._cut_scales) for region in self._regions
        }
        kinds = _find_kinds(planned)
        rows = self._send_rows(
            kinds, [decay_scalars(require_muon(groups[group]), _scale(rest)) for group, rest in kinds]
        )
        kernel = self._state.accelerator.kernels["scale_decay_update"]

        def call(parts: Sequence[Part], index: int, vectors: Vectors) -> Sequence[Tensor | None]:
            weight, direction, low = vectors
            results: tuple[Tensor, Tensor | None] = kernel(weight, direction, rows[_kind(parts[index])], keep, low)
            return results

        for region in self._regions:
            parts = planned[region.name]
            if any(part.kind is not None for part in parts):
                vectors = [self._state.owned_fp32(region), directions[region.name], self._state.owned_low(region)]
                run_parts(self._state, region, "apply", parts, vectors, (0, 2), partial(call, parts))

    def _cut_scales(self, region: Region, touched: set[str]) -> list[Part]:
        """By group and scale."""
        found: list[Found] = []
        for one in self._matrices[region.name]:
            group = self._state.plan.placement_by_name[one.name][1].group
            scale = update_scale(one.rows, one.columns, self._muon.rules.scale)
            found.append((one.start, one.stop, (group, scale) if one.name in touched else None))
        return self._cut(region, sorted(found, key=lambda one: one[0]))

    # -- both --------------------------------------------------------------------------------------------------

    def _held(self, region: Region) -> int:
        first, stop = self._state.owned_bounds(region)
        return stop - first

    def _cut(self, region: Region, found: Sequence[Found]) -> list[Part]:
        parts = cut_alike(found, self._held(region))
        return mask_apart(found, self._held(region)) if parts is None else parts

    def _plan_parts(
        self, use: str, region: Region, touched: set[str], cut: Callable[[Region, set[str]], list[Part]]
    ) -> list[Part]:
        """As in the step before, if that touched the same."""
        names = frozenset(one.name for one in region.placements if one.name in touched)
        known = self._parts.get((use, region.name))
        if known is None or known[0] != names:
            known = self._parts[use, region.name] = (names, cut(region, touched))
        return known[1]

    def _send_rows(self, kinds: Sequence[Kind], rows: Sequence[Tensor]) -> dict[Kind, Tensor]:
        """All numbers of a step go to the device at once: data of one program, whatever they are."""
        if not kinds:
            return {}
        sent = self._state.accelerator.send(torch.stack(list(rows)))
        return {kind: sent[row] for row, kind in enumerate(kinds)}


def _find_kinds(planned: Mapping[str, Sequence[Part]]) -> list[Kind]:
    return list(dict.fromkeys(part.kind for parts in planned.values() for part in parts if part.kind is not None))


def _kind(part: Part) -> Kind:
    assert part.kind is not None
    return part.kind


def _scale(rest: object) -> float:
    assert isinstance(rest, float)
    return rest
