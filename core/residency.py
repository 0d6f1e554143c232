"""Sharded weights (stage 3): gather a unit into its slot before use, let it go after, fetch the next one ahead.

[Note: slots]
A unit is always gathered into the slot that the plan gave it, so what autograd saved in forward (views of the
weights) is valid again once the unit has been gathered for its backward. A parameter is a view of its slot as
long as the slot holds its unit; when the slot is taken, the parameter keeps its shape, takes no memory and reads
as NaN. Slots are written through a buffer of their own, which leaves the parameters' version counters alone.

[Note: calls]
Each call of a module that uses a unit is one `_Call`: it uses the unit in forward from the pre-hook to the post-hook,
and in backward from the first gradient of its outputs to the last gradient of its inputs, or longer if the unit's
own gradients have not landed and nobody needs the slot. A weight that is read outside of any call (by another
module, or between forward and backward) gives its unit a slot of its own: right from then on, at the price of
memory, and counted.

[Note: meeting]
Where `fetch` needs no partner, a rank fetches what it uses. Elsewhere a fetch is a collective, so units that this
rank skipped are fetched too, in the order of the plan, to keep step with ranks that use them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from windlass.accelerator.interface import Work
from windlass.core.plan import Plan, Unit
from windlass.core.slots import SlotTable
from windlass.core.specs import dtype_from_name
from windlass.core.state import ModelState
from windlass.core.trees import iterate_tensors, map_tensors

TAG = "weights"


@dataclass
class _Call:
    """One call of a module: the units it uses and where they were."""

    places: tuple[tuple[str, int], ...]  # (unit, slot)
    generation: int  # of the weights
    inputs: int = 0  # how many gradients of inputs (or nodes, see _watch_nodes) end the call
    inputs_awaited: int = 0
    in_backward: bool = False
    closed: bool = False


class GuardedParameters(dict[str, Any]):
    """A module's `_parameters` which says when one of them is read."""

    def __init__(self, items: dict[str, Any], read: Callable[[str], None]) -> None:
        super().__init__(items)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is not None:
            self._read(key)
        return value


@dataclass
class _Order:
    """Units in the order of one kind of pass, and how far this pass has come."""

    units: tuple[str, ...]
    cursor: int = 0
    positions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = {unit: index for index, unit in enumerate(self.units)}


class Residency:
    """Decides which units' weights are on the device, by hooks on the modules that use them."""

    def __init__(self, state: ModelState, expects_more: Callable[[str], bool]) -> None:
        self.state = state
        self.plan: Plan = state.plan
        self.accelerator = state.accelerator
        self.extra_slots = 0  # slots taken beyond the plan
        self._expects_more = expects_more
        self._must_meet = not self.accelerator.capabilities.one_sided and state.group.size > 1
        self._table = SlotTable({u.name: u.slot for u in self.plan.units if u.slot is not None})
        self._slots: list[Tensor] = [self._allocate(size) for size in self.plan.slot_bytes]
        self._views: dict[tuple[str, int], dict[str, Tensor]] = {}  # (unit, slot) -> region -> its part of the slot
        self._arriving: dict[int, list[Work]] = {}
        self._bound: dict[str, int] = {}  # unit -> the slot that its parameters are views of
        self._generation = 0
        taking_turns = [u.name for u in self.plan.units if u.slot is not None and not self._owns_slot(u.name)]
        self._forward = _Order(tuple(taking_turns))
        self._backward = _Order(tuple(reversed(taking_turns)))
        self._in_backward = False
        self._open_backward: list[_Call] = []
        self._held: list[int] = []  # slots kept in use until the weights change
        self._stacks: dict[str, list[_Call]] = defaultdict(list)
        self._handles: list[Any] = []
        self._guarded: list[nn.Module] = []
        self._install_hooks()

    # -- hooks -------------------------------------------------------------------------------------------------

    def _install_hooks(self) -> None:
        users: dict[str, list[str]] = defaultdict(list)
        for unit in self.plan.units:
            for path in unit.users:
                users[path].append(unit.name)
        for path, units in users.items():
            module = self.state.module.get_submodule(path)
            before = self._make_before(path, tuple(units))
            after = self._make_after(path)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        unit_of: dict[int, str] = {}
        for region in self.plan.regions:
            for placement in region.placements:
                unit_of[id(self.state.parameters[placement.name])] = region.unit
        for module in self.state.module.modules():
            names = {
                name: unit_of[id(one)] for name, one in module._parameters.items() if one is not None
            }  # fmt: skip
            if names:
                module._parameters = GuardedParameters(module._parameters, self._make_guard(names))
                self._guarded.append(module)

    def _make_before(self, path: str, units: tuple[str, ...]) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._enter(units)
            self._stacks[path].append(call)
            if not torch.is_grad_enabled():
                return None
            watch = self._make_watch(call)
            return map_tensors(watch, args), map_tensors(watch, kwargs)

        return _untraced(before)

    def _make_watch(self, call: _Call) -> Callable[[Tensor], Tensor]:
        def watch(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            inner = tensor.view_as(tensor)  # its gradient is that of this call's use alone
            call.inputs += 1
            call.inputs_awaited += 1
            inner.register_hook(lambda _: self._input_arrived(call))
            return inner

        return watch

    def _make_after(self, path: str) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not self._stacks[path]:
                return  # the pass was abandoned
            call = self._stacks[path].pop()
            for _, slot in call.places:
                self._table.release(slot)
            results = [one for one in iterate_tensors(output) if one.requires_grad and one.grad_fn is not None]
            for tensor in results:
                tensor.register_hook(lambda _: self._begin_call_backward(call))
            if call.inputs == 0 and not all(self._owns_slot(unit) for unit, _ in call.places):
                self._watch_nodes(call, results)

        return _untraced(after)

    def _watch_nodes(self, call: _Call, results: list[Tensor]) -> None:
        """A call into which no gradient flows back is over when every node of its graph has run."""
        nodes: set[Node] = set()
        pending = [one.grad_fn for one in results]
        while pending:
            node = pending.pop()
            if node is None or node in nodes or not node.next_functions:  # leaves only store gradients
                continue
            nodes.add(node)
            pending += [following for following, _ in node.next_functions]
        call.inputs = call.inputs_awaited = len(nodes)
        for node in nodes:
            node.register_hook(lambda *_: self._input_arrived(call))

    def _make_guard(self, unit_of: dict[str, str]) -> Callable[[str], None]:
        def read(name: str) -> None:
            unit = unit_of.get(name)
            if unit is not None and not self._table.in_use(unit):
                self._read_outside_of_calls(unit)

        return read

    # -- calls -------------------------------------------------------------------------------------------------

    def _enter(self, units: tuple[str, ...]) -> _Call:
        order = self._backward if self._in_backward else self._forward
        for unit in units:
            self._keep_step(order, unit)
            slot = self._table.slot_of[unit]
            if not self._table.resident(unit, slot) and not self._table.free_for(unit, slot):
                slot = self._take_extra_slot(unit)
            self._bring(unit, slot)
            self._table.acquire(slot)
        call = _Call(tuple((unit, self._table.slot_of[unit]) for unit in units), self._generation)
        for unit in units:
            if not self._in_backward:
                self._fetch_ahead(self._forward, unit)
        return call

    def _begin_call_backward(self, call: _Call) -> None:
        """The gradient of an output has arrived: the call's units are about to be read again."""
        if call.in_backward:
            return
        if call.generation != self._generation:
            raise RuntimeError(
                "a backward pass reached weights that an optimizer step has changed since the forward pass; call "
                "backward before step, or run the forward pass again"
            )
        call.in_backward = True
        self._in_backward = True
        for unit, slot in call.places:
            self._keep_step(self._backward, unit)
            self._yield_slot(unit, slot)
            self._bring(unit, slot)
            self._table.acquire(slot)
        self._open_backward.append(call)
        for unit, _ in call.places:
            self._fetch_ahead(self._backward, unit)
        if call.inputs_awaited == 0:
            self._close_if_done(call)

    def _yield_slot(self, unit: str, slot: int) -> None:
        """Make calls leave the slot that have nothing left to do but to wait for gradients that may never come."""
        for other in list(self._open_backward):
            over = other.inputs > 0 and other.inputs_awaited == 0
            if over and any(name != unit and place == slot for name, place in other.places):
                self._close(other)
        if not self._table.free_for(unit, slot):
            holder = self._table.holds[slot]
            self._take_extra_slot(unit)
            raise RuntimeError(
                f"unit {unit or '(root)'} is needed in backward while its gather slot is in use by "
                f"{holder or '(root)'}; run the step again: the unit has a slot of its own now"
            )

    def _input_arrived(self, call: _Call) -> None:
        call.inputs_awaited -= 1
        self._close_if_done(call)

    def gradient_landed(self, unit: str) -> None:
        """A gradient of the unit has landed: calls that waited for it may be over."""
        for call in [one for one in self._open_backward if any(name == unit for name, _ in one.places)]:
            self._close_if_done(call)

    def _close_if_done(self, call: _Call) -> None:
        if not call.in_backward or call.closed or call.inputs_awaited > 0:
            return
        if any(self._expects_more(unit) and not self._used_by_others(unit, call) for unit, _ in call.places):
            return
        self._close(call)

    def _used_by_others(self, unit: str, call: _Call) -> bool:
        return any(
            one is not call and not one.closed and any(name == unit for name, _ in one.places)
            for one in self._open_backward
        )

    def _close(self, call: _Call) -> None:
        call.closed = True
        self._open_backward.remove(call)
        for _, slot in call.places:
            self._table.release(slot)

    # -- passes ------------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """The model is called."""
        self.abandon()
        if self._must_meet:
            for unit in self.plan.units:
                if unit.name not in self._forward.positions:
                    self._start_fetch(unit.name, self._table.slot_of[unit.name])

    def abandon(self) -> None:
        """Whatever an unfinished pass left in use is over."""
        self._stacks.clear()
        self._open_backward.clear()
        self._in_backward = False
        self._table.users.clear()
        for slot in self._held:
            self._table.acquire(slot)
        self._forward.cursor = 0

    def finish_forward(self) -> None:
        """The model has returned."""
        self._catch_up(self._forward, len(self._forward.units))

    def begin_backward(self) -> None:
        self._in_backward = True
        self._backward.cursor = 0

    def finish_backward(self) -> None:
        """The backward pass is over: no call uses anything any more."""
        for call in list(self._open_backward):
            self._close(call)
        self._catch_up(self._backward, len(self._backward.units))
        self._in_backward = False

    def weights_changed(self) -> None:
        """After an update: nothing in the slots is current."""
        for slot, unit in list(self._table.holds.items()):
            self._settle(slot)
            self._unbind(unit)
        for slot in self._held:
            self._table.release(slot)
        self._held.clear()
        self._table.invalidate()
        self._generation += 1

    # -- bytes -------------------------------------------------------------------------------------------------

    def _bring(self, unit: str, slot: int) -> None:
        """Have the unit's current weights in the slot and its parameters bound to them."""
        self._start_fetch(unit, slot)
        self._settle(slot)
        if self._bound.get(unit) != slot:
            self._bind(unit, slot)

    def _start_fetch(self, unit: str, slot: int) -> None:
        if self._table.resident(unit, slot):
            return
        self._settle(slot)
        evicted = self._table.place(unit, slot)
        if evicted is not None:
            self._leave(evicted, slot)
        works = []
        with self.accelerator.streams.lane("gather"):
            for region, target in self._parts(unit, slot).items():
                shard = self.state.weights[region]
                works.append(self.accelerator.collectives.fetch(target, shard, self.state.group, tag=TAG))
        self._arriving[slot] = works

    def _settle(self, slot: int) -> None:
        works = self._arriving.pop(slot, None)
        if works is None:
            return
        for work in works:
            work.wait()

    def _leave(self, unit: str, lost: int) -> None:
        """The unit has lost a slot: if its parameters were there, they go where it still is, or nowhere."""
        if self._bound.get(unit) != lost:
            return
        others = [slot for slot, holder in self._table.holds.items() if holder == unit and slot not in self._arriving]
        if others:
            self._bind(unit, others[0])
        else:
            self._unbind(unit)

    def _bind(self, unit: str, slot: int) -> None:
        self._bound[unit] = slot
        for region, whole in self._parts(unit, slot).items():
            for placement in self.plan.region_by_name[region].placements:
                self.state.bind(placement, whole)

    def _unbind(self, unit: str) -> None:
        self._bound.pop(unit, None)
        for region in self.plan.unit_by_name[unit].regions:
            for placement in self.plan.region_by_name[region].placements:
                self.state.unbind(placement)

    def _fetch_ahead(self, order: _Order, unit: str) -> None:
        position = order.positions.get(unit)
        if position is None:
            return
        for ahead in order.units[position + 1 : position + 1 + self.plan.prefetch]:
            slot = self._table.slot_of[ahead]
            if self._table.free_for(ahead, slot):
                self._start_fetch(ahead, slot)

    def _keep_step(self, order: _Order, unit: str) -> None:
        position = order.positions.get(unit)
        if position is not None and position >= order.cursor:
            self._catch_up(order, position)
            order.cursor = position + 1

    def _catch_up(self, order: _Order, position: int) -> None:
        """[Note: meeting] Fetch the units that this rank skipped, unless fetching needs no partner."""
        if self._must_meet:
            for unit in order.units[order.cursor : position]:
                slot = self._table.slot_of[unit]
                if self._table.free_for(unit, slot):
                    self._start_fetch(unit, slot)
        order.cursor = max(order.cursor, position)

    # -- reads and slots beyond the plan -----------------------------------------------------------------------

    def _read_outside_of_calls(self, unit: str) -> None:
        slot = self._table.slot_of[unit]
        if torch.is_grad_enabled() and not self._owns_slot(unit):
            # Autograd may save a view of it, for a node that no call announces: the slot must never be another's.
            slot = self._take_extra_slot(unit)
        elif not self._table.free_for(unit, slot):
            slot = self._take_extra_slot(unit)
        self._bring(unit, slot)
        if torch.is_grad_enabled() and slot not in self._held:
            self._held.append(slot)
            self._table.acquire(slot)

    def _owns_slot(self, unit: str) -> bool:
        slot = self._table.slot_of[unit]
        return sum(1 for other in self._table.slot_of.values() if other == slot) == 1

    def _take_extra_slot(self, unit: str) -> int:
        size = sum(part.numel() * part.element_size() for part in self._parts(unit, self._table.slot_of[unit]).values())
        self._slots.append(self._allocate(size))
        self.extra_slots += 1
        slot = len(self._slots) - 1
        self._table.add_slot(unit, slot)
        return slot

    def _allocate(self, size: int) -> Tensor:
        return self.accelerator.memory.empty((size,), torch.uint8, tag="gather_slots")

    def _parts(self, unit: str, slot: int) -> dict[str, Tensor]:
        if (unit, slot) not in self._views:
            parts, offset = {}, 0
            one: Unit = self.plan.unit_by_name[unit]
            for name in one.regions:
                region = self.plan.region_by_name[name]
                dtype = dtype_from_name(region.dtype)
                size = region.numel * dtype.itemsize
                parts[name] = self._slots[slot][offset : offset + size].view(dtype)
                offset += size
            self._views[unit, slot] = parts
        return self._views[unit, slot]

    def close(self) -> None:
        """Remove the hooks and give the slots back. Parameters keep their shapes and read as NaN."""
        self.weights_changed()
        for handle in self._handles:
            handle.remove()
        for module in self._guarded:
            module._parameters = dict(module._parameters)
        self._views.clear()
        for slot in self._slots:
            self.accelerator.memory.release(slot)
        self._slots = []


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which torch.compile must not try to look into."""
    return cast(Callable[..., Any], torch.compiler.disable(hook))
