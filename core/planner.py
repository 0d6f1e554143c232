"""The planner: specs, ranks and settings in, plan out. Pure, deterministic, without a device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from windlass.core.layout import LARGEST_JOINT, join_units, lay_out
from windlass.core.mesh import Mesh
from windlass.core.muon import MuonRules
from windlass.core.muon_plan import MuonPlan
from windlass.core.muon_planner import BYTES, FormTable, MuonCosts, plan_muon, usual_costs
from windlass.core.muon_uniform_planner import plan_muon_uniformly
from windlass.core.plan import Plan, Prediction, Region, Rules, Traffic, Unit
from windlass.core.qk_clip_plan import QKClipPlan
from windlass.core.slots import SlotTable, assign_slots, simulate_pass
from windlass.core.specs import ParamSpec, UnitSpec

RULES = {
    0: Rules(reduce_at="boundary", weights="resident", update="replicated", after_update="nothing"),
    1: Rules(reduce_at="boundary", weights="resident", update="shard", after_update="all_gather"),
    2: Rules(reduce_at="unit", weights="resident", update="shard", after_update="all_gather"),
    3: Rules(reduce_at="unit", weights="gathered", update="shard", after_update="publish"),
}
STATISTICS = 4  # squares, finite check, loss, wish to stop; then a flag per unit and per parameter
UNIFORM_STATISTICS = 5  # squares, finite check, loss, wish to stop, digest of what the step is made of
REDUCE_SLOTS = 2  # one being filled while the other is on its way


@dataclass(frozen=True)
class PlanSettings:
    """What the configuration decides about the plan."""

    stage: int = 0
    precision: str = "fp32"
    gradient_accumulation_steps: int = 1
    gradient_dtype: str | None = None  # None: the planner decides
    prefetch: int = 1  # units gathered ahead of the one in use
    device_memory_budget: int | None = None  # bytes per rank
    views: bool = True  # the accelerator's capability: parameters can live in a buffer that is used again and again
    uniform_program: bool = False  # the accelerator's capability: every rank must run the same program
    capture_update: bool = False  # record the update once and replay it; not with a uniform program, nor without views
    moment_dtype: str = "float32"  # or bfloat16, rounded stochastically
    seed: int = 0  # of that rounding
    muon: MuonRules | None = None  # for the parameters whose specs say so
    muon_costs: MuonCosts | None = None  # None: what machines that multiply in the dtype of its rules usually have
    qk_clip: QKClipPlan | None = None  # with muon only


def make_plan(specs: Sequence[ParamSpec], units: Sequence[UnitSpec], mesh: Mesh, settings: PlanSettings) -> Plan:
    """Decide layout, owners, slots and schedule. Raises ValueError for what cannot be planned."""
    _check(specs, mesh, settings)
    rules = replace(
        RULES[settings.stage],
        buffers="kept" if settings.views else "per_use",
        program="uniform" if settings.uniform_program else "free",
        issue="captured" if settings.capture_update else "anew",
    )
    shards, table = mesh.size("shard"), FormTable(settings.muon or MuonRules())
    homes: dict[str, str] = {}
    own_units = units
    if settings.muon is not None and rules.weights == "resident":
        most = math.inf if rules.reduce_at == "boundary" else LARGEST_JOINT  # gradients wait for each other anyway
        homes, units = join_units(specs, units, shards, settings.uniform_program, most)
    regions = lay_out(
        specs,
        own_units,
        shards,
        homes=homes,
        frozen=rules.weights == "gathered",
        uniform=settings.uniform_program,
        gradient_dtype=lambda dtype: _gradient_dtype(dtype, settings, rules),
        cost=table.cost,
    )
    muon = None
    if settings.muon is not None:
        plan_matrices = plan_muon_uniformly if settings.uniform_program else plan_muon
        costs = settings.muon_costs or usual_costs(settings.muon)
        muon = plan_matrices(specs, regions, table, settings.muon, rules, costs)
        muon = replace(muon, qk_clip=settings.qk_clip)
    of_unit: dict[str, list[Region]] = defaultdict(list)
    for region in regions:
        of_unit[region.unit].append(region)
    present = [unit for unit in units if of_unit[unit.name]]
    gathered = rules.weights == "gathered"
    slot_of = assign_slots([(u.name, u.spans) for u in present], settings.prefetch + 1) if gathered else {}
    planned = tuple(
        Unit(u.name, u.users, tuple(region.name for region in of_unit[u.name]), slot_of.get(u.name)) for u in present
    )
    slot_bytes = [0] * (max(slot_of.values(), default=-1) + 1)
    for name, slot in slot_of.items():
        slot_bytes[slot] = max(slot_bytes[slot], sum(region.numel * BYTES[region.dtype] for region in of_unit[name]))
    reduce_slot_bytes: tuple[int, ...] = ()
    if rules.reduce_at == "unit":
        largest = max((_gradient_bytes(of_unit[u.name]) for u in present), default=0)
        reduce_slot_bytes = (largest,) * min(REDUCE_SLOTS, len(present))
    prediction = _predict(regions, present, slot_of, settings, rules, sum(slot_bytes), sum(reduce_slot_bytes))
    if muon is not None:
        prediction = _with_muon(prediction, muon, regions, rules)
    _check_budget(prediction, settings)
    return Plan(
        stage=settings.stage,
        mesh=mesh,
        precision=settings.precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        prefetch=settings.prefetch,
        rules=rules,
        units=planned,
        regions=regions,
        aliases={spec.name: spec.tied_to for spec in specs if spec.tied_to is not None},
        slot_bytes=tuple(slot_bytes),
        reduce_slot_bytes=reduce_slot_bytes,
        prediction=prediction,
        moment_dtype=settings.moment_dtype,
        noise_seed=settings.seed if _rounds_moments(settings) else 0,
        muon=muon,
        facts=_facts(specs, regions),
    )


def _check(specs: Sequence[ParamSpec], mesh: Mesh, settings: PlanSettings) -> None:
    if settings.capture_update and (settings.uniform_program or not settings.views):
        raise ValueError("an update cannot be captured where programs are uniform or buffers are made for each use")
    if settings.stage not in RULES:
        raise ValueError(f"zero_optimization.stage is 0, 1, 2 or 3, got {settings.stage}")
    if not specs:
        raise ValueError("the model has no parameters, so there is nothing to train; pass a module that has some")
    if not any(spec.trainable for spec in specs):
        raise ValueError(
            f"the model has {len(specs)} parameters but none with requires_grad, so there is nothing to train; "
            "unfreeze at least one"
        )
    if mesh.size("replicate") > 1:
        raise ValueError(
            f"hybrid sharding (a replicate axis of {mesh.size('replicate')}) is not there yet; use one shard axis"
        )
    if settings.muon is not None and not any(spec.trainable and spec.algorithm == "muon" for spec in specs):
        raise ValueError(
            f"Muon was chosen, but none of the model's {len(specs)} parameters is a matrix that it is for; choose "
            "AdamW, or name parameters in muon.roles"
        )
    for spec in specs:
        if spec.dtype not in BYTES:
            raise ValueError(
                f"parameter {spec.name!r} has dtype {spec.dtype}, which cannot be trained here; cast the model to "
                f"one of {', '.join(BYTES)}, for example with model.float()"
            )


def _gradient_dtype(dtype: str, settings: PlanSettings, rules: Rules) -> str:
    """Of the local gradient. Where one gradient lands once before its reduction, the dtype autograd made is exact;
    where several are added up locally, fp32 unless the configuration says otherwise."""
    if settings.gradient_dtype is not None:
        return settings.gradient_dtype
    adds_up_locally = rules.reduce_at == "boundary" and settings.gradient_accumulation_steps > 1
    return "float32" if adds_up_locally else dtype


def _gradient_bytes(regions: Sequence[Region]) -> int:
    return sum(region.numel * BYTES[region.gradient_dtype] for region in regions if region.trainable)


def _predict(
    regions: Sequence[Region],
    units: Sequence[UnitSpec],
    slot_of: Mapping[str, int],
    settings: PlanSettings,
    rules: Rules,
    slot_bytes: int,
    reduce_slot_bytes: int,
) -> Prediction:
    trainable = [region for region in regions if region.trainable]
    shards = trainable[0].num_shards
    others = shards - 1

    def traffic(kind: str, tag: str, part_bytes: Sequence[int]) -> list[Traffic]:
        return [Traffic(kind, tag, len(part_bytes), others * sum(part_bytes))] if part_bytes else []

    reduced = [region.shard_numel * BYTES[region.gradient_dtype] for region in trainable]
    reduce = traffic("reduce_scatter", "gradients", reduced)
    per_micro = reduce if rules.reduce_at == "unit" else []
    boundary = [] if per_micro else list(reduce)
    if rules.program == "uniform":
        statistics = 4 * UNIFORM_STATISTICS
    else:
        statistics = 4 * (STATISTICS + len(units) + sum(len(region.placements) for region in trainable))
    boundary += traffic("all_gather", "statistics", [statistics])
    if rules.update == "replicated":
        boundary += traffic("all_gather", "gradients", [region.shard_numel * 4 for region in trainable])
    if rules.after_update == "all_gather":
        boundary += traffic("all_gather", "weights", [region.shard_numel * BYTES[region.dtype] for region in trainable])
    first: list[Traffic] = []
    later: list[Traffic] = []
    if rules.weights == "gathered":
        table = SlotTable(dict(slot_of))
        spans = {unit.name: unit.spans for unit in units}
        forward = [unit.name for unit in units]
        of_unit: dict[str, list[int]] = defaultdict(list)
        for region in regions:
            of_unit[region.unit].append(region.shard_numel * BYTES[region.dtype])
        for into in (first, later):
            fetched = simulate_pass(table, forward, spans, settings.prefetch)
            fetched += simulate_pass(table, forward[::-1], spans, settings.prefetch)
            into += traffic("all_gather", "weights", [part for name in fetched for part in of_unit[name]])
    return Prediction(
        first_micro_step=(*first, *per_micro),
        micro_step=(*later, *per_micro),
        boundary=tuple(boundary),
        persistent=_persistent(regions, settings, rules, slot_bytes, reduce_slot_bytes),
        working=_working(trainable, rules, slot_bytes, reduce_slot_bytes),
    )


def _persistent(
    regions: Sequence[Region], settings: PlanSettings, rules: Rules, slots: int, reduce_slots: int
) -> dict[str, int]:
    """Bytes per rank between steps, by tag of the memory facet."""
    trainable = [region for region in regions if region.trainable]
    owned = {r.name: r.numel if rules.update == "replicated" else r.shard_numel for r in trainable}
    whole = rules.weights == "resident"
    apart = rules.program == "uniform" and rules.update == "shard" and whole
    memory = {
        "weights": sum((r.numel if whole else r.shard_numel) * BYTES[r.dtype] for r in regions),
        "master": sum(owned[r.name] * 4 for r in trainable if r.dtype != "float32" or (apart and r.num_shards > 1)),
        "optimizer": sum(owned[r.name] * _moment_bytes(r, settings) for r in trainable),
    }
    if rules.buffers == "kept":
        memory |= _gradient_buffers(trainable, rules)
        memory["gather_slots"] = slots
        memory["reduce_slots"] = reduce_slots
    if rules.issue == "captured" and rules.update == "shard":
        memory["reduced"] = 4 * sum(r.shard_numel for r in trainable if not _sum_lies_inside(r, rules))
    return {tag: size for tag, size in memory.items() if size}


def _rounds_moments(settings: PlanSettings) -> bool:
    """Whether some of the optimizer's state has 16 bits."""
    dtypes = {settings.moment_dtype} | ({settings.muon.momentum_dtype} if settings.muon else set())
    return dtypes != {"float32"}


def _moment_bytes(region: Region, settings: PlanSettings) -> int:
    """Optimizer state per element: Muon has a momentum only, AdamW two moments."""
    if region.algorithm == "muon" and settings.muon is not None:
        return BYTES[settings.muon.momentum_dtype]
    return 2 * BYTES[settings.moment_dtype]


def _with_muon(prediction: Prediction, muon: MuonPlan, regions: Sequence[Region], rules: Rules) -> Prediction:
    """What Muon adds: the exchange, update inputs of what this rank holds, and what is on its way."""
    costs = muon.prediction
    by_rank = tuple(
        (Traffic("all_gather" if rules.update == "replicated" else "all_to_all", "muon", costs.calls, received),)
        for received in map(sum, zip(costs.inward, costs.outward, strict=True))
        if costs.calls
    )
    maxima = []
    if muon.qk_clip is not None:
        maxima = [Traffic("all_reduce", "qk clip", 1, 4 * muon.qk_clip.heads * (regions[0].num_shards - 1))]
    owned = sum(
        region.numel if rules.update == "replicated" else region.shard_numel
        for region in regions
        if region.algorithm == "muon"
    )
    inputs = owned * BYTES[muon.rules.direction_dtype]
    kept = {"muon": inputs} if rules.issue == "captured" else {}
    passing = (costs.buffer_bytes or 4 * costs.wave_bytes) + (0 if kept else inputs)
    return replace(
        prediction,
        boundary=(*prediction.boundary, *maxima),
        by_rank=by_rank,
        persistent={**prediction.persistent, **kept},
        working={**prediction.working, "muon": passing},
    )


def _gradient_buffers(trainable: Sequence[Region], rules: Rules) -> dict[str, int]:
    """Whole gradients: those of this rank until the boundary, and the sums over ranks where everybody has them all."""
    memory = {}
    if rules.reduce_at == "boundary":
        memory["gradients"] = _gradient_bytes(trainable)
    if rules.update == "replicated":
        memory["reduced"] = sum(r.numel * 4 for r in trainable if r.gradient_dtype != "float32")
    return memory


def _sum_lies_inside(region: Region, rules: Rules) -> bool:
    """Whether a rank's sum over ranks can be written over its part of the gradient, where programs are free."""
    return rules.reduce_at == "boundary" and (region.gradient_dtype == "float32" or region.num_shards == 1)


def _working(trainable: Sequence[Region], rules: Rules, slots: int, reduce_slots: int) -> dict[str, int]:
    """Bytes that exist only while a step runs: reduced shards in fp32, and buffers made for one use."""
    memory: dict[str, int] = {}
    if rules.buffers == "per_use":
        memory = {"gather_slots": slots, "reduce_slots": reduce_slots, **_gradient_buffers(trainable, rules)}
    if rules.update == "shard" and rules.issue == "anew":
        apart = [r for r in trainable if rules.reduce_at == "unit" or r.gradient_dtype != "float32"]
        memory["reduced"] = sum(r.shard_numel * 4 for r in apart)
    if rules.program == "uniform" and rules.reduce_at == "boundary":  # no sum lies inside of what was summed
        memory["reduced"] = memory.get("reduced", 0) * (rules.update == "replicated")
        memory["reduced"] += sum(r.shard_numel * 4 for r in trainable if r.num_shards > 1)
    return {tag: size for tag, size in memory.items() if size}


def _check_budget(prediction: Prediction, settings: PlanSettings) -> None:
    needed = sum(prediction.persistent.values()) + sum(prediction.working.values())
    budget = settings.device_memory_budget
    if budget is not None and needed > budget:
        raise ValueError(
            f"the plan needs {needed:,} bytes of device memory per rank for model states, more than "
            f"plan.device_memory_budget of {budget:,}; use a higher ZeRO stage, more ranks or a smaller model"
        )


def _facts(specs: Sequence[ParamSpec], regions: Sequence[Region]) -> dict[str, Any]:
    own = [spec for spec in specs if spec.tied_to is None]
    used = sum(one.numel for region in regions for one in region.placements)
    return {
        "parameters": sum(spec.numel for spec in own),
        "trainable": sum(spec.numel for spec in own if spec.trainable),
        "padding": sum(region.numel for region in regions) - used,
    }
