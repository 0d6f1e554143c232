"""Where Muon's parameters lie, against a look at every element: whole matrices, little padding, one program."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest

from published_models import GPT2, GPT_30M, LLAMA_8B, LLAMA_70B, make_gpt, make_llama, make_mixture
from windlass.core.mesh import data_parallel_mesh
from windlass.core.muon import MuonRules
from windlass.core.plan import ALIGNMENT, Plan, Region
from windlass.core.planner import PlanSettings, make_plan
from windlass.core.specs import ParamSpec, Role, UnitSpec

Sizes = Sequence[tuple[int, int]]


def plan_of(specs: Sequence[ParamSpec], units: Sequence[UnitSpec], stage: int, ranks: int, uniform: bool) -> Plan:
    settings = PlanSettings(stage=stage, precision="bf16", muon=MuonRules(), uniform_program=uniform)
    return make_plan(specs, units, data_parallel_mesh(ranks), settings)


def layers_of(*layers: Sizes) -> tuple[list[ParamSpec], list[UnitSpec]]:
    """A unit for each, with matrices of these sizes and a bias."""
    specs, units = [], []
    for number, sizes in enumerate(layers):
        unit = f"layer{number}"
        units.append(UnitSpec(unit, (unit,), False))
        specs.append(ParamSpec(f"{unit}.bias", (sizes[0][0],), "float32", Role.BIAS, unit))
        for place, shape in enumerate(sizes):
            specs.append(ParamSpec(f"{unit}.{place}", shape, "float32", Role.MATRIX, unit, algorithm="muon"))
    return specs, units


def muon_regions(plan: Plan) -> list[Region]:
    return [region for region in plan.regions if region.algorithm == "muon"]


def crossing(region: Region) -> list[str]:
    """Parameters that lie in several shards."""
    shard = region.shard_numel
    return [one.name for one in region.placements if one.start // shard != (one.stop - 1) // shard]


def padding(plan: Plan) -> float:
    """Parts of the elements of Muon's parameters."""
    regions = muon_regions(plan)
    used = sum(one.numel for region in regions for one in region.placements)
    return sum(region.numel for region in regions) / used - 1


ODD = layers_of([(7, 24), (64, 24), (24, 64)], [(48, 24), (5, 3)], [(24, 24)] * 5, [(130, 3)])


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_parameter_lies_once_and_apart_from_the_others(stage: int, ranks: int, uniform: bool) -> None:
    specs, units = ODD
    plan = plan_of(specs, units, stage, ranks, uniform)
    seen: Counter[str] = Counter()
    for region in plan.regions:
        elements: list[str | None] = [None] * region.numel
        assert region.shard_numel % ALIGNMENT == 0
        for one in region.placements:
            assert one.start % ALIGNMENT == 0
            assert set(elements[one.start : one.stop]) == {None}
            elements[one.start : one.stop] = [one.name] * one.numel
        seen += Counter(name for name in elements if name is not None)
    assert seen == {spec.name: spec.numel for spec in specs}
    muon = {one.name for region in muon_regions(plan) for one in region.placements}
    assert muon == {spec.name for spec in specs if spec.algorithm == "muon"}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("stage", [1, 2])
def test_matrices_are_dealt_whole_with_little_padding(stage: int, ranks: int) -> None:
    for specs, units in (make_gpt(*GPT2), make_gpt(*GPT_30M), make_llama(*LLAMA_8B)):
        plan = plan_of(specs, units, stage, ranks, uniform=False)
        assert [name for region in muon_regions(plan) for name in crossing(region)] == []
        assert padding(plan) <= min(0.1, 1 / ranks)


@pytest.mark.parametrize("ranks", [16, 32, 64, 128, 256])
def test_padding_never_costs_more_than_travelling(ranks: int) -> None:
    """Padding travels with gradients and weights: a part of 1 / N is as much as all matrices going to owners."""
    for specs, units in (make_gpt(*GPT2), make_llama(*LLAMA_8B), make_llama(*LLAMA_70B)):
        assert padding(plan_of(specs, units, 1, ranks, uniform=False)) <= 1 / ranks


def test_units_are_joined_until_their_matrices_can_be_dealt() -> None:
    specs, units = layers_of(*[[(64, 64)]] * 8)
    assert [unit.name for unit in plan_of(specs, units, 2, 1, False).units] == [f"layer{i}" for i in range(8)]
    joined = plan_of(specs, units, 2, 4, False)
    assert [unit.name for unit in joined.units] == ["layer0..layer3", "layer4..layer7"]
    assert [unit.users for unit in joined.units][1] == ("layer4", "layer5", "layer6", "layer7")
    assert [len(region.placements) for region in joined.regions] == [1, 1, 1, 1, 4] * 2  # biases, and matrices
    assert [len(unit.regions) for unit in joined.units] == [5, 5]
    assert len(plan_of(specs, units, 3, 4, False).units) == 8  # gathered weights do not wait for each other


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 4), (2, 4), (2, 8), (3, 4)])
def test_what_adamw_updates_lies_as_on_one_rank(stage: int, ranks: int) -> None:
    """Joined units or not: the noise of 16-bit moments goes by these places."""
    specs, units = make_gpt(*GPT2)

    def places(stage: int, ranks: int) -> dict[str, tuple[str, int]]:
        regions = plan_of(specs, units, stage, ranks, uniform=False).regions
        return {p.name: (r.name, p.start) for r in regions if r.algorithm == "adamw" for p in r.placements}

    assert places(stage, ranks) == places(1, 1)


def test_what_is_left_over_joins_the_units_before_it() -> None:
    specs, units = layers_of(*[[(64, 64)]] * 4, *[[(8, 8)]] * 3)
    plan = plan_of(specs, units, 2, 4, False)
    assert [unit.name for unit in plan.units] == ["layer0..layer6"]
    assert [crossing(region) for region in muon_regions(plan)] == [[]]


def test_one_matrix_too_many_stays_as_it_was() -> None:
    """Five equal matrices on four ranks would leave three shards half empty."""
    specs, units = layers_of(*[[(64, 64)]] * 5)
    plan = plan_of(specs, units, 2, 4, False)
    assert [unit.name for unit in plan.units] == ["layer0..layer3", "layer4"]
    assert [crossing(region) for region in muon_regions(plan)] == [[], ["layer4.0"]]


def test_joints_have_a_limit_where_gradients_are_reduced_unit_by_unit() -> None:
    specs, units = layers_of(*[[(8192, 8192)]] * 16)  # of 67 million elements each
    assert len(plan_of(specs, units, 2, 16, False).units) == 16
    assert len(plan_of(specs, units, 1, 16, False).units) == 1


@pytest.mark.parametrize("stage", [1, 2])
def test_shards_of_a_uniform_layout_look_alike(stage: int) -> None:
    sizes: Sizes = [(64, 32), (32, 64), (64, 32), (32, 64), (128, 32), (128, 32)]
    specs, units = layers_of(*[sizes] * 4)
    plan = plan_of(specs, units, stage, 4, uniform=True)
    shapes = {spec.name: spec.shape for spec in specs}
    for region in muon_regions(plan):
        shards = [
            sorted((one.start - first, shapes[one.name]) for one in region.placements if first <= one.start < last)
            for first, last in map(region.shard_bounds, range(4))
        ]
        assert crossing(region) == []
        assert all(shard == shards[0] for shard in shards[1:])


def test_stacks_are_cut_between_experts() -> None:
    specs, units = make_mixture(2, 64, 8, 32)
    for stage, ranks in itertools.product((1, 2, 3), (2, 4, 8)):
        plan = plan_of(specs, units, stage, ranks, uniform=False)
        for region in muon_regions(plan):
            if region.placements[0].name.endswith((".gate", ".down")):
                assert len(region.placements) == 1
                assert region.shard_numel % (32 * 64) == 0
                assert region.numel == 8 * 32 * 64  # nothing is padding
    ragged = plan_of(specs, units, 2, 3, uniform=False)  # nine places for eight experts would be too many
    assert any(region.shard_numel % (32 * 64) for region in muon_regions(ragged))


def test_frozen_matrices_are_not_muons() -> None:
    specs, units = ODD
    frozen = [dataclasses.replace(spec, trainable=spec.unit != "layer0") for spec in specs]
    plan = plan_of(frozen, units, 3, 4, uniform=False)
    muon = {one.name for region in muon_regions(plan) for one in region.placements}
    assert not any(name.startswith("layer0") for name in muon)
    still = [region for region in plan.regions if not region.trainable]
    assert {one.name for region in still for one in region.placements} == {s.name for s in specs if s.unit == "layer0"}
