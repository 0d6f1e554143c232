"""The plan: who owns which bytes, when they move, what is computed on them. Plain data, made before the first step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from windlass.core.mesh import Mesh
from windlass.core.muon_plan import MuonPlan

PLAN_VERSION = 1
ALIGNMENT = 64  # elements: 128 bytes of a two-byte dtype, so one layout serves every dtype


@dataclass(frozen=True)
class Placement:
    """Where one parameter lies in its region, in elements of the whole (unsharded) region."""

    name: str
    start: int
    shape: tuple[int, ...]
    group: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Region:
    """A flat buffer of one unit's parameters of one dtype, cut into equal shards, one per rank.

    What AdamW updates is laid out in the same way at every ZeRO stage: that is why the stages agree to the bit. Whole
    matrices, which Muon needs, are dealt to shards where that takes little padding, so their places may depend on the
    number of ranks and on the stage.
    """

    name: str
    unit: str
    dtype: str
    trainable: bool
    placements: tuple[Placement, ...]
    shard_numel: int
    num_shards: int
    gradient_dtype: str  # of the local gradient, before the reduction
    algorithm: str = "adamw"  # or "muon"

    @property
    def numel(self) -> int:
        return self.shard_numel * self.num_shards

    def shard_bounds(self, rank: int) -> tuple[int, int]:
        """First and past-last element that `rank` owns."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel


@dataclass(frozen=True)
class Unit:
    """Parameters that move together. `slot` is the gather slot (None: the weights are always resident)."""

    name: str
    users: tuple[str, ...]
    regions: tuple[str, ...]
    slot: int | None


@dataclass(frozen=True)
class Rules:
    """What the ZeRO stage decided. The executor reads these and never the stage."""

    reduce_at: Literal["boundary", "unit"]  # gradients are reduced once per step, or per unit in each backward
    weights: Literal["resident", "gathered"]  # whole weights on every rank, or shards gathered for use
    update: Literal["replicated", "shard"]  # optimizer state and update: everything everywhere, or each its shard
    after_update: Literal["nothing", "all_gather", "publish"]  # how new weights reach the others
    buffers: Literal["kept", "per_use"] = (
        "kept"  # gradients, gather and reduce slots: for the whole training, or made for each use
    )
    program: Literal["free", "uniform"] = (
        "free"  # uniform: all ranks run the same operations, and none waits for the host before the update
    )
    issue: Literal["anew", "captured"] = (
        "anew"  # captured: the update is recorded once and replayed, so what it reads lies where it lay before
    )


@dataclass(frozen=True)
class Traffic:
    """Predicted calls and received bytes per rank of one kind of collective under one tag."""

    kind: str
    tag: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Prediction:
    """What the counters must show.

    `micro_step` is one forward and backward, `first_micro_step` the one after an update (nothing is gathered
    yet), `boundary` the optimizer step. `persistent` is bytes per rank between steps by tag, `working` what is
    allocated in addition while a step runs.
    """

    first_micro_step: tuple[Traffic, ...]
    micro_step: tuple[Traffic, ...]
    boundary: tuple[Traffic, ...]
    persistent: Mapping[str, int]
    working: Mapping[str, int]
    by_rank: tuple[tuple[Traffic, ...], ...] = ()  # of the boundary too: what is not the same on every rank

    def step(self, micro_steps: int, rank: int = 0) -> dict[tuple[str, str], tuple[int, int]]:
        """(kind, tag) -> (calls, bytes) of one whole optimizer step. Ranks differ in what they exchange for Muon."""
        total: dict[tuple[str, str], tuple[int, int]] = {}
        own = self.by_rank[rank] if self.by_rank else ()
        parts = [self.first_micro_step, *[self.micro_step] * (micro_steps - 1), self.boundary, own]
        for traffic in (one for part in parts for one in part):
            calls, received = total.get((traffic.kind, traffic.tag), (0, 0))
            total[traffic.kind, traffic.tag] = (calls + traffic.calls, received + traffic.bytes)
        return total


@dataclass(frozen=True)
class Plan:
    """Everything the executor needs, the same on every rank. Compare plans by `hash`."""

    stage: int
    mesh: Mesh
    precision: str  # "fp32", "bf16", "fp16"
    gradient_accumulation_steps: int
    prefetch: int
    rules: Rules
    units: tuple[Unit, ...]
    regions: tuple[Region, ...]
    aliases: Mapping[str, str]  # tied name -> name that owns the bytes
    slot_bytes: tuple[int, ...]  # gather slots
    reduce_slot_bytes: tuple[int, ...]  # buffers in which a unit's gradients wait for their reduction
    prediction: Prediction
    moment_dtype: str = "float32"
    noise_seed: int = 0  # of the rounding of moments of 16 bits
    muon: MuonPlan | None = None
    version: int = PLAN_VERSION
    facts: Mapping[str, Any] = field(default_factory=dict)  # for people: model size, why something was chosen

    @property
    def shards_apart(self) -> bool:
        """Where whole weights are resident, what a rank owns of them lies in tensors of its own: a slice at an offset
        that depends on the rank would make the ranks' programs differ."""
        apart = self.rules.program == "uniform" and self.rules.update == "shard" and self.rules.weights == "resident"
        return apart and self.mesh.size("shard") > 1

    def moment_dtype_of(self, region: Region) -> str:
        """In which the optimizer's state of a region is kept."""
        return self.muon.rules.momentum_dtype if self.muon and region.algorithm == "muon" else self.moment_dtype

    @cached_property
    def region_by_name(self) -> dict[str, Region]:
        return {region.name: region for region in self.regions}

    @cached_property
    def unit_by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @cached_property
    def placement_by_name(self) -> dict[str, tuple[Region, Placement]]:
        """Parameter name, aliases included -> where it lies."""
        table = {one.name: (region, one) for region in self.regions for one in region.placements}
        table.update({alias: table[owner] for alias, owner in self.aliases.items() if owner in table})
        return table

    @cached_property
    def parameter_index(self) -> dict[str, int]:
        """Trainable parameter -> its place in the vector of touched parameters."""
        names = [one.name for region in self.regions if region.trainable for one in region.placements]
        return {name: index for index, name in enumerate(names)}

    def to_json(self) -> dict[str, Any]:
        """The whole plan as JSON-ready data."""
        return {"hash": self.hash, **_plain(self)}

    @cached_property
    def hash(self) -> str:
        """A digest of everything but `facts`; equal on all ranks before the first collective."""
        data = _plain(self)
        data.pop("facts")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def fingerprint(self) -> dict[str, str]:
        """Name -> digest of each part, so that a difference between ranks can be named."""
        parts: dict[str, Any] = {f"region {region.name!r}": asdict(region) for region in self.regions}
        parts.update({f"unit {unit.name!r}": asdict(unit) for unit in self.units})
        for one in fields(self):
            if one.name not in ("regions", "units", "facts", "prediction"):
                parts[one.name] = _plain(getattr(self, one.name))
        return {
            name: hashlib.sha256(json.dumps(_plain(part), sort_keys=True).encode()).hexdigest()[:12]
            for name, part in parts.items()
        }

    def __str__(self) -> str:
        from windlass.core.plan_text import render_plan

        return render_plan(self)


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON types."""
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
