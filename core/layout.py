"""Where parameters lie: one region per unit, dtype, trainability and algorithm, cut into equal shards.

[Note: whole matrices] Muon needs whole matrices. Where the matrices of a unit, or of some units together, can be dealt
to the shards with little padding, each lies whole inside one shard: its rank receives the whole gradient by the
reduction that happens anyway, and nothing travels beyond that. Weights that are gathered unit by unit cannot wait for
each other, so units are joined only where weights are resident. Where no such deal is found, parameters lie one after
the other, the cuts fall where they fall, and update inputs travel to owners. What AdamW updates lies in the regions of
its own unit, joined or not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from windlass.core.matrices import find_matrices
from windlass.core.owners import pack_shards
from windlass.core.plan import ALIGNMENT, Placement, Region
from windlass.core.specs import ParamSpec, Role, UnitSpec

MOST_PADDING = 0.1
"""Of the elements of a region."""
LARGEST_JOINT = 500_000_000
"""Elements of units that are joined where gradients are reduced unit by unit: they wait for each other in a buffer."""

_Place = tuple[list[Placement], int]  # placements, elements of a shard


def most_padding(shards: int) -> float:
    """Parts of a region's elements. More than that, and update inputs travel instead, which for every matrix costs as
    many bytes as a padding of one part in `shards`: padding travels with gradients and weights."""
    return min(MOST_PADDING, 1 / shards)


def align(numel: int) -> int:
    """The next multiple of the alignment."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def join_units(
    specs: Sequence[ParamSpec],
    units: Sequence[UnitSpec],
    shards: int,
    uniform: bool,
    most: float = LARGEST_JOINT,  # elements
) -> tuple[dict[str, str], tuple[UnitSpec, ...]]:
    """Join neighbouring units until the matrices of each can be dealt whole; units for which that does not succeed
    stay as they are. Only for plans whose weights are resident. Returns which of them each unit went to, and them."""
    of_unit: dict[str, list[ParamSpec]] = defaultdict(list)
    for spec in specs:
        if spec.tied_to is None and spec.trainable and spec.algorithm == "muon" and not _deals_itself(spec, shards):
            of_unit[spec.unit].append(spec)
    joined: list[list[UnitSpec]] = []
    waiting: list[UnitSpec] = []
    members: list[ParamSpec] = []
    for unit in units:
        waiting.append(unit)
        members += of_unit[unit.name]
        if deal(members, shards, uniform) is not None:
            joined.append(waiting)
        elif sum(spec.numel for spec in members) <= most:
            continue
        else:
            joined += [[one] for one in waiting]
        waiting, members = [], []
    joined += _join_rest(waiting, joined, of_unit, shards, uniform, most)
    names = {unit.name: _joint_name(group) for group in joined for unit in group}
    made = tuple(
        UnitSpec(
            _joint_name(group),
            tuple(dict.fromkeys(user for unit in group for user in unit.users)),
            any(unit.spans for unit in group),
        )
        for group in joined
    )
    return names, made


def _join_rest(
    rest: list[UnitSpec],
    joined: list[list[UnitSpec]],
    of_unit: dict[str, list[ParamSpec]],
    shards: int,
    uniform: bool,
    most: float,
) -> list[list[UnitSpec]]:
    """What was left over joins the group before it if the whole can be dealt."""
    if rest and joined:
        together = [*joined[-1], *rest]
        members = [spec for unit in together for spec in of_unit[unit.name]]
        if sum(spec.numel for spec in members) <= most and deal(members, shards, uniform) is not None:
            joined.pop()
            return [together]
    return [[unit] for unit in rest]


def _joint_name(group: Sequence[UnitSpec]) -> str:
    if len(group) == 1:
        return group[0].name
    return f"{group[0].name or 'root'}..{group[-1].name or 'root'}"


@dataclass(frozen=True)
class _Bucket:
    """What the parameters of a region have in common."""

    home: str  # the unit that they move with
    unit: str  # what they lie with: their own unit, or, dealt to shards, the joint one
    dtype: str
    trainable: bool
    algorithm: str
    alone: str  # the name of a parameter that has a region of its own

    def rank(self, homes: Mapping[str, int], units: Mapping[str, int]) -> tuple[int | str | bool, ...]:
        """Where it comes in the order of regions."""
        return (
            homes[self.home], self.dtype, not self.trainable, self.algorithm, self.alone, units.get(self.unit, -1)
        )  # fmt: skip


def lay_out(
    specs: Sequence[ParamSpec],
    units: Sequence[UnitSpec],
    shards: int,
    *,
    homes: Mapping[str, str],  # unit -> the joint unit that it is in, if any
    frozen: bool,  # frozen weights have regions too
    uniform: bool,
    gradient_dtype: Callable[[str], str],
    cost: Callable[[ParamSpec], int],
) -> tuple[Region, ...]:
    """All regions; parameters in order of group, then of definition, unless whole matrices are dealt."""
    order = {unit.name: index for index, unit in enumerate(units)}
    first: dict[str, int] = {}  # of each home
    for unit in units:
        first.setdefault(homes.get(unit.name, unit.name), order[unit.name])
    buckets: dict[_Bucket, list[ParamSpec]] = defaultdict(list)
    for spec in specs:
        # Frozen weights have no state to shard; only where all weights are sharded do they need a region.
        if spec.tied_to is None and (spec.trainable or frozen):
            algorithm = spec.algorithm if spec.trainable else "adamw"
            alone = spec.name if algorithm == "muon" and _deals_itself(spec, shards) else ""
            home = homes.get(spec.unit, spec.unit)
            beside = home if algorithm == "muon" else spec.unit
            buckets[_Bucket(home, beside, spec.dtype, spec.trainable, algorithm, alone)].append(spec)
    regions = []
    loads = [0] * shards  # of Newton-Schulz, by rank
    for key in sorted(buckets, key=lambda one: one.rank(first, order)):
        members = sorted(buckets[key], key=lambda one: one.group)
        place = None
        suffix = "" if key.trainable else "/frozen"
        if key.algorithm == "muon":
            suffix = f"/muon/{key.alone}" if key.alone else "/muon"
            stack = bool(key.alone)
            place = _place_stack(members[0], shards) if stack else _place_dealt(members, shards, uniform, loads, cost)
        placements, shard = place or _place_in_order(members, shards)
        regions.append(
            Region(
                name=f"{key.unit or 'root'}/{key.dtype}{suffix}",
                unit=key.home,
                dtype=key.dtype,
                trainable=key.trainable,
                placements=tuple(placements),
                shard_numel=shard,
                num_shards=shards,
                gradient_dtype=gradient_dtype(key.dtype),
                algorithm=key.algorithm,
            )
        )
    return tuple(regions)


def _place_in_order(members: Sequence[ParamSpec], shards: int) -> _Place:
    placements, position = [], 0
    for spec in members:
        placements.append(Placement(spec.name, position, spec.shape, spec.group))
        position += align(spec.numel)
    return placements, align(-(-position // shards))


# -- whole matrices ----------------------------------------------------------------------------------------------


def deal(members: Sequence[ParamSpec], shards: int, uniform: bool) -> list[list[int]] | None:
    """Indices of the parameters in each shard, or None if that takes too much padding. `uniform`: all shards look
    alike, so that every rank runs one program."""
    if shards == 1 or not members:
        return [list(range(len(members)))] + [[] for _ in range(shards - 1)]
    sizes = [align(spec.numel) for spec in members]
    if uniform:
        dealt: list[list[int]] = [[] for _ in range(shards)]
        for alike in _alike(members).values():
            if len(alike) % shards:
                return None
            for place, index in enumerate(alike):
                dealt[place % shards].append(index)
        return dealt
    if max(sizes) * shards > (1 + most_padding(shards)) * sum(sizes):
        return None
    dealt = pack_shards(sizes, shards)
    largest = max(sum(sizes[index] for index in shard) for shard in dealt)
    return dealt if largest * shards <= (1 + most_padding(shards)) * sum(sizes) else None


def _alike(members: Sequence[ParamSpec]) -> dict[object, list[int]]:
    """Parameters that could change places."""
    kinds: dict[object, list[int]] = defaultdict(list)
    for index, spec in enumerate(members):
        kinds[spec.numel, find_matrices(spec)].append(index)
    return kinds


def _place_dealt(
    members: Sequence[ParamSpec], shards: int, uniform: bool, loads: list[int], cost: Callable[[ParamSpec], int]
) -> _Place | None:
    """The shard with most to do goes to the rank that has least to do so far, whose load grows by it."""
    dealt = deal(members, shards, uniform)
    if dealt is None:
        return None
    costs = [sum(cost(members[index]) for index in shard) for shard in dealt]
    ranks = sorted(range(shards), key=lambda rank: (loads[rank], rank))
    hands: list[list[int]] = [[] for _ in range(shards)]
    for place, rank in zip(sorted(range(shards), key=lambda one: (-costs[one], one)), ranks, strict=True):
        hands[rank] = dealt[place]
        loads[rank] += costs[place]
    shard = max(align(sum(align(members[index].numel) for index in hand)) for hand in hands)
    return list(_place_hands(members, hands, shard)), shard


def _place_hands(members: Sequence[ParamSpec], hands: Sequence[Sequence[int]], shard: int) -> Iterator[Placement]:
    for rank, hand in enumerate(hands):
        position = rank * shard
        for index in hand:
            spec = members[index]
            yield Placement(spec.name, position, spec.shape, spec.group)
            position += align(spec.numel)


def _deals_itself(spec: ParamSpec, shards: int) -> bool:
    """A stack of experts that can be cut between experts has a region of its own."""
    if spec.role is not Role.EXPERTS or shards == 1:
        return False
    experts, size = spec.shape[0], math.prod(spec.shape[1:])
    return size > 0 and size % ALIGNMENT == 0 and -(-experts // shards) * shards <= (1 + most_padding(shards)) * experts


def _place_stack(spec: ParamSpec, shards: int) -> _Place:
    experts, size = spec.shape[0], math.prod(spec.shape[1:])
    return [Placement(spec.name, 0, spec.shape, spec.group)], -(-experts // shards) * size
