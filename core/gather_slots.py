"""The gather slots of sharded weights: fetch a unit into its slot, bind its parameters there, let it leave.

[Note: slots]
A unit is always gathered into the slot that the plan gave it, so what autograd saved in forward (views of the
weights) is valid again once the unit has been gathered for its backward. A parameter is a view of its slot as
long as the slot holds its unit; when the slot is taken, the parameter keeps its shape, takes no memory and reads
as NaN. Slots are written through a buffer of their own, which leaves the parameters' version counters alone.

Where the accelerator has no views, a slot is only a number: the unit is gathered into memory made for this use, its
parameters are written from there, and the memory is given back. What autograd saves of them is in saved_weights.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.interface import Work
from windlass.core.plan import Plan
from windlass.core.slots import SlotTable
from windlass.core.specs import dtype_from_name
from windlass.core.state import ModelState

TAG = "weights"
MEMORY_TAG = "gather_slots"


class GatherSlots:
    """The slots' memory and what is in it. `table` says which unit is where and in use."""

    def __init__(self, state: ModelState) -> None:
        self.state = state
        self.plan: Plan = state.plan
        self.accelerator = state.accelerator
        self.table = SlotTable({unit.name: unit.slot for unit in self.plan.units if unit.slot is not None})
        self.extra_slots = 0  # slots taken beyond the plan
        self._kept = self.plan.rules.buffers == "kept"
        self._count = len(self.plan.slot_bytes)
        self._slots: list[Tensor] = [self._allocate(size) for size in self.plan.slot_bytes] if self._kept else []
        self._parts: dict[tuple[str, int], dict[str, Tensor]] = {}  # (unit, slot) -> region -> its part of the slot
        self._made: dict[int, dict[str, Tensor]] = {}  # slot -> region -> what was gathered for one use
        self._arriving: dict[int, list[Work]] = {}
        self._bound: dict[str, int] = {}  # unit -> the slot that its parameters are views of
        self.versions: dict[str, int] = {}  # parameter bound for one use -> its version counter at that time

    def bring(self, unit: str, slot: int) -> None:
        """Have the unit's current weights in the slot and its parameters bound to them."""
        with torch.inference_mode(False):  # what is made here outlives an evaluation in inference mode
            self.start_fetch(unit, slot)
            self._settle(slot)
            if self._bound.get(unit) != slot:
                self._bind(unit, slot)

    def start_fetch(self, unit: str, slot: int) -> None:
        """Begin to gather the unit, unless it is there; whoever had the slot leaves."""
        if self.table.resident(unit, slot):
            return
        self._settle(slot)
        self._give_back(slot)
        evicted = self.table.place(unit, slot)
        if evicted is not None:
            self._leave(evicted, slot)
        with torch.inference_mode(False):
            targets = self._parts_of(unit, slot) if self._kept else self._make_parts(unit, slot)
        streams = self.accelerator.streams
        computed = streams.record()  # what was computed with the slot's last weights must be over
        works = []
        with streams.lane("gather"), torch.inference_mode(False):
            streams.wait(computed)
            for region, target in targets.items():
                shard = self.state.weights[region]
                works.append(self.accelerator.collectives.fetch(target, shard, self.state.group, tag=TAG))
        self._arriving[slot] = works

    def is_bound(self, unit: str) -> bool:
        """True if the unit's parameters are its current weights."""
        return unit in self._bound

    def owns_slot(self, unit: str) -> bool:
        """True if no other unit uses this unit's slot."""
        slot = self.table.slot_of[unit]
        return sum(1 for other in self.table.slot_of.values() if other == slot) == 1

    def take_extra_slot(self, unit: str) -> int:
        """Give the unit a slot of its own from now on, beyond the plan."""
        with torch.inference_mode(False):
            if self._kept:
                planned = self._parts_of(unit, self.table.slot_of[unit])
                self._slots.append(self._allocate(sum(part.numel() * part.element_size() for part in planned.values())))
        self.extra_slots += 1
        slot = self._count
        self._count += 1
        self.table.add_slot(unit, slot)
        return slot

    def invalidate(self) -> None:
        """The weights have changed: nothing in the slots is current."""
        self.settle()
        for slot, unit in list(self.table.holds.items()):
            self._give_back(slot)
            self._unbind(unit)
        self.table.invalidate()

    def close(self) -> None:
        """Give the memory back. Parameters keep their shapes and read as NaN."""
        self.invalidate()
        self._parts.clear()
        for slot in self._slots:
            self.accelerator.memory.release(slot)
        self._slots = []

    def settle(self) -> None:
        """Wait for everything under way: the shards may be rewritten afterwards."""
        for slot in list(self._arriving):
            self._settle(slot)

    def _settle(self, slot: int) -> None:
        for work in self._arriving.pop(slot, ()):
            work.wait()

    def _leave(self, unit: str, lost: int) -> None:
        """The unit has lost a slot: if its parameters were there, they go where it still is, or nowhere."""
        if self._bound.get(unit) != lost:
            return
        others = [slot for slot, holder in self.table.holds.items() if holder == unit and slot not in self._arriving]
        if others:
            self._bind(unit, others[0])
        else:
            self._unbind(unit)

    def _bind(self, unit: str, slot: int) -> None:
        self._bound[unit] = slot
        # Without a part of its own in the slot the parameters have been written from another one: they are current.
        parts = self._parts_of(unit, slot) if self._kept else self._made.get(slot, {})
        for region, whole in parts.items():
            for placement in self.plan.region_by_name[region].placements:
                self.state.bind(placement, whole)
                if not self._kept:
                    self.versions[placement.name] = self.state.parameters[placement.name]._version
        self._give_back(slot)

    def _unbind(self, unit: str) -> None:
        self._bound.pop(unit, None)
        for region in self.plan.unit_by_name[unit].regions:
            for placement in self.plan.region_by_name[region].placements:
                self.state.unbind(placement)
                self.versions.pop(placement.name, None)

    def _allocate(self, size: int) -> Tensor:
        return self.accelerator.memory.empty((size,), torch.uint8, tag=MEMORY_TAG)

    def _make_parts(self, unit: str, slot: int) -> dict[str, Tensor]:
        """Memory for one use of the unit, each region in its own dtype."""
        regions = [self.plan.region_by_name[name] for name in self.plan.unit_by_name[unit].regions]
        self._made[slot] = {
            region.name: self.accelerator.memory.empty((region.numel,), dtype_from_name(region.dtype), tag=MEMORY_TAG)
            for region in regions
        }
        return self._made[slot]

    def _give_back(self, slot: int) -> None:
        """What was made for one use is not needed any more."""
        for part in self._made.pop(slot, {}).values():
            self.accelerator.memory.release(part)

    def _parts_of(self, unit: str, slot: int) -> dict[str, Tensor]:
        if (unit, slot) not in self._parts:
            parts, offset = {}, 0
            for name in self.plan.unit_by_name[unit].regions:
                region = self.plan.region_by_name[name]
                dtype = dtype_from_name(region.dtype)
                size = region.numel * dtype.itemsize
                parts[name] = self._slots[slot][offset : offset + size].view(dtype)
                offset += size
            self._parts[unit, slot] = parts
        return self._parts[unit, slot]
