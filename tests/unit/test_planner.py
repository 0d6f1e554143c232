"""The planner against formulas: layout, memory, traffic, slots, determinism, refusals. No device."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from windlass.core.mesh import Mesh, data_parallel_mesh
from windlass.core.plan import ALIGNMENT, Plan
from windlass.core.planner import PlanSettings, make_plan
from windlass.core.specs import describe_model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)


class Stack(nn.Module):
    def __init__(self, layers: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def stack(layers: int = 5, width: int = 24, tied: bool = False) -> nn.Module:
    return Stack(layers, width, tied)


def plan(
    module: nn.Module, stage: int, ranks: int, precision: str = "fp32", accumulation: int = 1, **more: Any
) -> Plan:
    dtype = {"fp32": None, "bf16": "bfloat16"}[precision]
    specs, units = describe_model(module, dtype=dtype)
    settings = PlanSettings(stage=stage, precision=precision, gradient_accumulation_steps=accumulation, **more)
    return make_plan(specs, units, data_parallel_mesh(ranks), settings)


def padded_sizes(module: nn.Module, ranks: int) -> list[int]:
    """Elements of each unit's region by the definition: parameters at multiples of 64, shards too."""
    units: Sequence[nn.Module] = [module.embedding, *module.blocks, module.head]  # type: ignore[misc, list-item]
    sizes = []
    for unit in units:
        numel = sum(-(-p.numel() // 64) * 64 for p in unit.parameters())
        sizes.append(-(-numel // (64 * ranks)) * 64 * ranks)
    return sizes


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_follows_the_formula(stage: int, precision: str, ranks: int) -> None:
    module = stack()
    sizes = padded_sizes(module, ranks)
    total, low = sum(sizes), precision == "bf16"
    two = 2 * max(sizes) * (2 if low else 4)
    owned = total if stage == 0 else total // ranks
    want = {"weights": (2 if low else 4) * (total // ranks if stage == 3 else total), "optimizer": 8 * owned}
    if low:
        want["master"] = 4 * owned
    if stage < 2:
        want["gradients"] = (2 if low else 4) * total
    else:
        want["reduce_slots"] = two
    if stage == 0 and low:
        want["reduced"] = 4 * total
    if stage == 3:
        want["gather_slots"] = two
    got = dict(plan(module, stage, ranks, precision).prediction.persistent)
    slack = got.pop("gather_slots", 0) - want.pop("gather_slots", 0)
    assert got == want
    assert slack <= 0  # a slot is as large as the largest unit that uses it


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_captured_update_keeps_the_sums(stage: int, precision: str, ranks: int) -> None:
    """Nothing else changes: what was working memory until the update stays, where it was made for each step."""
    plain, captured = (plan(stack(), stage, ranks, precision, capture_update=one).prediction for one in (False, True))
    kept = dict(captured.persistent)
    apart = stage >= 2 or (stage == 1 and precision == "bf16" and ranks > 1)
    if apart:
        assert kept.pop("reduced") == 4 * sum(padded_sizes(stack(), ranks)) // ranks == plain.working["reduced"]
        assert not captured.working
    assert kept == dict(plain.persistent)
    assert "recorded once and replayed" in str(plan(stack(), stage, ranks, precision, capture_update=True))


def test_what_cannot_be_captured_is_refused() -> None:
    refused: tuple[dict[str, Any], ...] = ({"views": False}, {"uniform_program": True})
    for more in refused:
        with pytest.raises(ValueError, match="cannot be captured"):
            plan(stack(), 1, 2, capture_update=True, **more)


def test_moments_of_16_bits_take_half_the_bytes() -> None:
    wide, narrow = (plan(stack(), 1, 2, "bf16", moment_dtype=one) for one in ("float32", "bfloat16"))
    assert 2 * narrow.prediction.persistent["optimizer"] == wide.prediction.persistent["optimizer"]
    assert wide.hash != narrow.hash
    assert "; moments in bfloat16" in str(narrow)
    assert "moments" not in str(wide)
    seeds = [plan(stack(), 1, 2, moment_dtype="bfloat16", seed=seed).hash for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    assert plan(stack(), 1, 2, seed=1).hash == plan(stack(), 1, 2, seed=2).hash


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_traffic_follows_the_formula(stage: int, ranks: int, accumulation: int) -> None:
    module = stack()
    sizes = padded_sizes(module, ranks)
    once = sum(sizes) // ranks * (ranks - 1)
    units, names = len(sizes), len(list(module.parameters()))
    step = plan(module, stage, ranks, "bf16", accumulation).prediction.step(accumulation)
    local = 4 if stage < 2 and accumulation > 1 else 2
    reductions = 1 if stage < 2 else accumulation
    assert step["reduce_scatter", "gradients"] == (units * reductions, once * local * reductions)
    assert step["all_gather", "statistics"] == (1, 4 * (ranks - 1) * (4 + units + names))
    if stage == 0:
        assert step["all_gather", "gradients"] == (units, 4 * once)
        assert ("all_gather", "weights") not in step
    elif stage < 3:
        assert step["all_gather", "weights"] == (units, 2 * once)
    else:
        # Forward and backward gather every unit, less the two that still lie in the two slots at each turn.
        assert step["all_gather", "weights"][0] == 2 * units * accumulation - 2 - 4 * (accumulation - 1)


def test_layout_is_the_same_at_every_stage_and_aligned() -> None:
    module = stack()
    layouts = {tuple((r.name, r.placements, r.shard_numel) for r in plan(module, s, 3).regions) for s in range(4)}
    assert len(layouts) == 1
    for region in plan(module, 3, 3).regions:
        assert region.shard_numel % ALIGNMENT == 0
        assert all(placement.start % ALIGNMENT == 0 for placement in region.placements)
        ends = [(placement.start, placement.stop) for placement in region.placements]
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))
        assert ends[-1][1] <= region.numel


def test_units_that_share_a_weight_keep_a_slot_of_their_own() -> None:
    made = plan(stack(tied=True), 3, 2)
    slots = {unit.name: unit.slot for unit in made.units}
    assert list(slots.values()).count(slots["embedding"]) == 1
    assert made.unit_by_name["embedding"].users == ("embedding", "head")
    assert made.aliases == {"head.weight": "embedding.weight"}
    assert made.placement_by_name["head.weight"] is made.placement_by_name["embedding.weight"]


def test_parameters_of_a_region_are_sorted_by_group() -> None:
    module = stack()
    groups = {id(p): 0 if p.dim() > 1 else 1 for p in module.parameters()}
    specs, units = describe_model(module, groups)
    made = make_plan(specs, units, data_parallel_mesh(2), PlanSettings(stage=1))
    for region in made.regions:
        order = [placement.group for placement in region.placements]
        assert order == sorted(order)


def test_hash_does_not_depend_on_the_process() -> None:
    script = "import test_planner as t; print(t.plan(t.stack(tied=True), 3, 4, 'bf16').hash)"
    hashes = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(__file__)}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        hashes.add(result.stdout.strip())
    assert hashes == {plan(stack(tied=True), 3, 4, "bf16").hash}


def test_hash_and_fingerprint_tell_plans_apart() -> None:
    one, other = plan(stack(), 1, 2), plan(stack(layers=4), 1, 2)
    assert one.hash != other.hash
    assert one.hash != plan(stack(), 2, 2).hash
    names = [name for name, digest in one.fingerprint().items() if other.fingerprint().get(name) != digest]
    assert "region 'blocks.4/float32'" in names


def test_plan_is_json() -> None:
    made = plan(stack(), 3, 2)
    data = json.loads(json.dumps(made.to_json()))
    assert data["hash"] == made.hash
    assert [region["name"] for region in data["regions"]] == [region.name for region in made.regions]


def test_a_hundred_billion_parameters_are_planned_without_a_device() -> None:
    with torch.device("meta"):
        module = stack(layers=126, width=16384)
    specs, units = describe_model(module)
    began = time.perf_counter()
    made = make_plan(specs, units, data_parallel_mesh(1024), PlanSettings(stage=3))
    print(f"planned {made.facts['parameters'] / 1e9:.0f} B parameters in {time.perf_counter() - began:.4f} s")
    assert made.facts["parameters"] > 100e9
    assert made.facts["padding"] < 0.01 * made.facts["parameters"]


def test_refusals_are_one_sentence() -> None:
    refused: list[tuple[nn.Module, str]] = [
        (nn.ReLU(), "the model has no parameters"),
        (nn.Linear(2, 2).requires_grad_(False), "has 2 parameters but none with requires_grad"),
        (nn.Linear(2, 2).double(), "'weight' has dtype float64"),
        (nn.Linear(2, 2, dtype=torch.complex64), "'weight' has dtype complex64"),
    ]
    for module, message in refused:
        with pytest.raises(ValueError, match=message) as error:
            plan(module, 1, 2)
        assert "\n" not in str(error.value)
    specs, units = describe_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="stage is 0, 1, 2 or 3, got 4"):
        make_plan(specs, units, data_parallel_mesh(2), PlanSettings(stage=4))
    with pytest.raises(ValueError, match="hybrid sharding"):
        make_plan(specs, units, Mesh((("replicate", 2), ("shard", 2))), PlanSettings(stage=1))
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of device memory per rank"):
        make_plan(specs, units, data_parallel_mesh(2), PlanSettings(stage=1, device_memory_budget=10))


def test_mesh_names_ranks_along_an_axis() -> None:
    mesh = Mesh((("replicate", 2), ("shard", 3)))
    assert mesh.num_ranks == 6
    assert mesh.coordinates(4) == {"replicate": 1, "shard": 1}
    assert mesh.ranks_along("shard", 4) == (3, 4, 5)
    assert mesh.ranks_along("replicate", 4) == (1, 4)
    assert mesh.size("expert") == 1
    with pytest.raises(ValueError, match="at least one rank"):
        Mesh((("shard", 0),))
