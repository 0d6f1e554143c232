"""Gradients from where autograd leaves them to where the update reads them: land, add up, reduce.

[Note: two ways to the reduction]
Where the plan reduces at the boundary (stages 0, 1) every gradient is added to this rank's own sums as soon as
autograd has made it, and autograd's tensor is dropped; the regions are reduced once, in `finish`.
Where the plan reduces per unit (stages 2, 3) gradients stay with their parameters until the unit is complete,
are packed into a reduce slot, and leave; what arrives is added up in this rank's shard. Units leave in one
fixed order (last unit first) and each exactly once per backward, so that all ranks make the same calls even if
they touched different parameters. A gradient that lands after its unit has left (a nested backward) waits for
the boundary: the ranks tell each other, and reduce such units once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from windlass.accelerator.interface import Work
from windlass.core.local_gradients import TAG, open_local_gradients, pack, write_packed
from windlass.core.plan import Plan, Region, Unit
from windlass.core.reduce_slots import ReduceSlots
from windlass.core.reduced_sums import ReducedSums
from windlass.core.state import ModelState, own_part


@dataclass
class _Reduction:
    """One region on its way: where the sum will be, and whether it is to be added to what is there."""

    region: Region
    work: Work
    arrived: Tensor
    slot: int | None = None
    packed: Tensor | None = None  # what is being sent, where it lies in a slot


class Gradients:
    """Receives every gradient of the plan's trainable parameters; `shards` holds the reduced sums."""

    def __init__(self, state: ModelState, before_landing: Callable[[], None], landed: Callable[[str], None]) -> None:
        """`before_landing` is called when a gradient appears, `landed` with its unit once it is accounted for."""
        self.state = state
        self.plan: Plan = state.plan
        self.accelerator = state.accelerator
        self.touched: set[str] = set()  # since the last update, on this rank
        self.passes = 0  # backward passes since then
        self.landing_scale = 1.0  # what a gradient is multiplied with when it lands
        self.shards: dict[str, Tensor] = {}  # fp32 sums over ranks, after `finish`
        self._before_landing = before_landing
        self._landed = landed
        self._per_unit = self.plan.rules.reduce_at == "unit"
        self._trainable = [region for region in self.plan.regions if region.trainable]
        self._kept = self.plan.rules.buffers == "kept"
        # The sum over ranks lies where this rank's part of it was, unless that offset would make programs differ.
        self._in_place = self.plan.rules.program == "free" or state.group.size == 1
        self._local = None if self._per_unit else open_local_gradients(self.plan, self.accelerator, state.group)
        self._replicated = self.plan.rules.update == "replicated"
        captured = self.plan.rules.issue == "captured"
        apart = [region for region in self._trainable if captured and self._is_transient(region)]
        self._sums = ReducedSums(self.accelerator, state.group, apart)
        self._replicas: dict[str, Tensor] = {}  # whole sums over ranks, where the update is replicated
        if self._kept and self._replicated:
            narrow = [region for region in self._trainable if region.gradient_dtype != "float32"]
            self._replicas = {region.name: self._sums.allocate(region.numel, shared=True) for region in narrow}
        self._slots = ReduceSlots(self.plan, self.accelerator, state.group)
        self._flying: deque[_Reduction] = deque()
        self._order: list[Unit] = [
            unit for unit in reversed(self.plan.units) if any(self._regions_of(unit))
        ]  # in which units leave
        self._left = 0  # how many units of this backward have left
        self._launched = 0  # how many have ever left; decides the slot
        self._expected: dict[str, set[str]] = {unit.name: self._names_of(unit) for unit in self._order}
        self._fired: dict[str, set[str]] = {unit.name: set() for unit in self._order}
        self._ever_fired: set[str] = set()
        self._handles: list[RemovableHandle] = []
        for region in self._trainable:
            for placement in region.placements:
                hook = self._make_hook(placement.name, region.unit)
                self._handles.append(state.parameters[placement.name].register_post_accumulate_grad_hook(hook))

    # -- landing -----------------------------------------------------------------------------------------------

    def _make_hook(self, name: str, unit: str) -> Callable[[Tensor], None]:
        def receive(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None and gradient.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of {name!r} is sparse ({gradient.layout}), which no plan can lay out; "
                    "build the embedding with sparse=False"
                )
            self._before_landing()
            if self._per_unit:
                self._fired[unit].add(name)
                self._launch_complete_units()
            else:
                self._land(name, self.state.parameters[name])
            self._landed(unit)

        return receive

    def _land(self, name: str, parameter: nn.Parameter) -> None:
        """Add one gradient to this rank's sums, and let autograd's tensor go."""
        assert self._local is not None
        if parameter.grad is not None:
            self._local.land(name, parameter.grad.detach(), self.landing_scale, new=name not in self.touched)
            self.touched.add(name)
            parameter.grad = None

    # -- reducing per unit -------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """A backward pass starts: every unit will leave once."""
        self.passes += 1
        self._left = 0
        for fired in self._fired.values():
            fired.clear()

    def expects_more(self, unit: str) -> bool:
        """True while gradients of the unit that the last backward produced have not landed in this one."""
        return unit in self._fired and not self._fired[unit] >= self._expected[unit]

    def _launch_complete_units(self) -> None:
        while self._left < len(self._order):
            unit = self._order[self._left]
            if not self._fired[unit.name] >= self._expected[unit.name]:
                return
            self._launch(unit)
            self._left += 1

    def finish_backward(self) -> None:
        """The backward pass is over: the units that have not left do, complete or not."""
        if self._per_unit:
            while self._left < len(self._order):
                self._launch(self._order[self._left])
                self._left += 1
        for unit in self._order:
            name = unit.name
            if self._fired[name]:
                self._expected[name] = set(self._fired[name])
                self._ever_fired.add(name)
                self._fired[name].clear()
            elif name not in self._ever_fired:
                self._expected[name] = set()  # never used so far: do not hold the others up

    def _launch(self, unit: Unit) -> None:
        """Pack a unit's gradients into the next slot and send them off."""
        index = self._launched % self._slots.count
        self._launched += 1
        while any(one.slot == index for one in self._flying):
            self._settle_oldest()
        for region, packed in self._slots.take(index, self._regions_of(unit)):
            self._pack(region, packed)
            arrived = self._sums.take(region)
            streams = self.accelerator.streams
            written = streams.record()
            with streams.lane("reduce"):
                streams.wait(written)
                work = self.accelerator.collectives.reduce_scatter(arrived, packed, self.state.group, tag=TAG)
            self._flying.append(_Reduction(region, work, arrived, index, packed))

    def _pack(self, region: Region, packed: Tensor) -> None:
        """Move the gradients of a region's parameters into `packed`."""
        values = {}
        for placement in region.placements:
            parameter = self.state.parameters[placement.name]
            if parameter.grad is not None:
                values[placement.name] = parameter.grad.detach()
                self.touched.add(placement.name)
                parameter.grad = None
        if self._kept:
            write_packed(packed, region, values, self.landing_scale)
        else:
            pack(packed, region, values, self.landing_scale)

    def _settle_oldest(self) -> None:
        """Wait for the reduction that left first, and keep or add up what arrived."""
        one = self._flying.popleft()
        one.work.wait()
        if one.packed is not None:
            self._slots.give_back(one.packed)
        name = one.region.name
        if not self._per_unit:
            return
        if name in self.shards:
            self.shards[name].add_(one.arrived)
            self.accelerator.memory.release(one.arrived, after=self.accelerator.streams.record())
        else:
            self.shards[name] = one.arrived

    # -- the boundary ------------------------------------------------------------------------------------------

    def leftovers(self) -> list[bool]:
        """Per unit of the plan: gradients landed here after the unit had left."""
        late = {unit.name for unit in self._order if self._per_unit and self._has_gradients(unit)}
        return [unit.name in late for unit in self.plan.units]

    def reduce_again(self, units: list[bool]) -> None:
        """Reduce units with leftovers on some rank once more. Every rank passes the same list."""
        late = {unit.name for unit, flag in zip(self.plan.units, units, strict=True) if flag}
        for unit in self._order:
            if unit.name in late:
                self._launch(unit)
        self._settle_all()

    def finish(self) -> None:
        """Have the sums over all ranks in `shards`: at the boundary everything is reduced now."""
        if not self._per_unit:
            for region in self._trainable:
                self._send_region(region)
        self._settle_all()

    def peek(self, region: Region) -> Tensor | None:
        """This rank's shard of the sums so far, leaving everything as it is. None: nothing has landed. A collective."""
        if self._per_unit:
            self._settle_all()
            return self.shards.get(region.name)
        assert self._local is not None
        target = torch.empty(region.shard_numel, dtype=torch.float32, device=self.accelerator.device)
        whole = self._local.whole(region, self.touched)
        self.accelerator.collectives.reduce_scatter(target, whole, self.state.group, tag="state").wait()
        return target

    def _send_region(self, region: Region) -> None:
        assert self._local is not None
        whole = self._local.take(region, self.touched)
        if self._replicated and region.name not in self._replicas:
            fp32 = region.gradient_dtype == "float32"
            self._replicas[region.name] = whole if fp32 else self._sums.allocate(region.numel, shared=True)
        if not self._in_place:
            target = self._sums.take(region)
        elif self._replicated:
            target = own_part(region, self._replicas[region.name], self.state.group)
        elif self._lies_inside(region):
            target = own_part(region, whole, self.state.group)
        else:
            target = self._sums.take(region)
        work = self.accelerator.collectives.reduce_scatter(target, whole, self.state.group, tag=TAG)
        self.shards[region.name] = target
        self._flying.append(_Reduction(region, work, target))

    def _settle_all(self) -> None:
        while self._flying:
            self._settle_oldest()

    def share_replicas(self) -> None:
        """Where the update is replicated: every rank gets the whole sums, in the same bits."""
        works = []
        for region in self._trainable if self._replicas else ():
            whole, own = self._replicas[region.name], self.shards[region.name]
            works.append(self.accelerator.collectives.all_gather(whole, own, self.state.group, tag=TAG))
        for work in works:
            work.wait()

    def for_update(self, region: Region) -> Tensor:
        """The summed gradient of the part of the region that is updated here."""
        return self._replicas[region.name] if region.name in self._replicas else self.shards[region.name]

    def clear(self) -> None:
        """The update has used the gradients (or they are dropped): forget them."""
        self._settle_all()
        for region in self._trainable:
            shard = self.shards.pop(region.name, None)
            if shard is not None and self._is_transient(region):
                self._sums.give_back(region, shard)
        if not self._kept:
            self._drop_replicas()
        if self._local is not None:
            self._local.clear()
        for name in self._names():
            self.state.parameters[name].grad = None
        self.touched.clear()
        self.passes = 0

    def close(self) -> None:
        """Remove the hooks and give the memory back."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._drop_replicas()
        self._sums.close()
        if self._local is not None:
            self._local.close()
        self._slots.close()

    def _drop_replicas(self) -> None:
        for region in self._trainable:
            whole = self._replicas.pop(region.name, None)
            if whole is not None and region.gradient_dtype != "float32":
                self.accelerator.memory.release(whole)

    # -- small questions ---------------------------------------------------------------------------------------

    def _is_transient(self, region: Region) -> bool:
        """The shard of the sum is memory of its own, made for this step."""
        if self._per_unit or not self._in_place:
            return True
        return not self._replicated and not self._lies_inside(region)

    def _lies_inside(self, region: Region) -> bool:
        """The sum over ranks can be written over this rank's part of the gradient."""
        return region.gradient_dtype == "float32" or region.num_shards == 1

    def _regions_of(self, unit: Unit) -> list[Region]:
        return [region for name in unit.regions if (region := self.plan.region_by_name[name]).trainable]

    def _names_of(self, unit: Unit) -> set[str]:
        return {placement.name for region in self._regions_of(unit) for placement in region.placements}

    def _names(self) -> list[str]:
        return [placement.name for region in self._trainable for placement in region.placements]

    def _has_gradients(self, unit: Unit) -> bool:
        return any(self.state.parameters[name].grad is not None for name in self._names_of(unit))
