"""Sharded weights (stage 3): gather a unit into its slot before use, let it go after, fetch the next one ahead.

[Note: calls]
Each call of a module that uses a unit is one `_Call`: it uses the unit in forward from the pre-hook to the post-hook,
and in backward from the first gradient of its outputs to the last gradient of its inputs, or longer if the unit's
own gradients have not landed and nobody needs the slot. A weight that is read outside of any call (by another
module, or between forward and backward) gives its unit a slot of its own: right from then on, at the price of
memory, and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from windlass.core.gather_slots import GatherSlots
from windlass.core.plan import Plan
from windlass.core.saved_weights import SavedWeights
from windlass.core.state import STALE_WEIGHTS, ModelState
from windlass.core.trees import iterate_tensors, map_tensors


@dataclass
class _Call:
    """One call of a module: the units it uses and where they were."""

    places: tuple[tuple[str, int], ...]  # (unit, slot)
    generation: int  # of the weights
    inputs: int = 0  # how many gradients of inputs (or nodes, see _watch_nodes) end the call
    inputs_awaited: int = 0
    hooked: bool = False  # it put the hooks of SavedWeights up, and takes them down
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


class Residency:
    """Decides which units' weights are on the device, by hooks on the modules that use them."""

    def __init__(self, state: ModelState, expects_more: Callable[[str], bool]) -> None:
        self.state = state
        self.plan: Plan = state.plan
        self._expects_more = expects_more
        self._slots = GatherSlots(state)
        self._table = self._slots.table
        per_use = self.plan.rules.buffers == "per_use"  # where slots are kept, autograd saves views of them
        self._saved = SavedWeights(state.parameters, self._slots.versions, self._weights_of, wanted=per_use)
        self._generation = 0
        taking_turns = [unit.name for unit in self.plan.units if not self._slots.owns_slot(unit.name)]
        self._ahead_in_forward = _following(taking_turns, self.plan.prefetch)
        self._ahead_in_backward = _following(taking_turns[::-1], self.plan.prefetch)
        self._all_trainable = {
            unit.name
            for unit in self.plan.units
            if all(self.plan.region_by_name[region].trainable for region in unit.regions)
        }
        self._in_backward = False
        self._open_backward: list[_Call] = []
        self._seen_in_backward: list[_Call] = []
        self._held: list[int] = []  # slots kept in use until the weights change
        self._stacks: dict[str, list[_Call]] = defaultdict(list)
        self._handles: list[Any] = []
        self._guarded: list[nn.Module] = []
        self._parameter_ids = {id(parameter) for parameter in state.parameters.values()}
        self._install_hooks()

    @property
    def extra_slots(self) -> int:
        """Slots taken beyond the plan."""
        return self._slots.extra_slots

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
            args, kwargs = map_tensors(watch, args), map_tensors(watch, kwargs)
            call.hooked = self._saved.begin()
            return args, kwargs

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
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._stacks[path]:
                return None  # the pass was abandoned
            call = self._stacks[path].pop()
            if call.hooked:
                self._saved.end()
            for _, slot in call.places:
                self._table.release(slot)
            replaced = any(self._is_weight(tensor) for tensor in iterate_tensors(output))
            if replaced:  # the slot's bytes do not outlive the call
                output = map_tensors(lambda one: one.clone() if self._is_weight(one) else one, output)
            results = [one for one in iterate_tensors(output) if one.requires_grad and one.grad_fn is not None]
            for tensor in results:
                tensor.register_hook(lambda _: self._begin_call_backward(call))
            if call.inputs == 0 and not all(self._slots.owns_slot(unit) for unit, _ in call.places):
                self._watch_nodes(call, results)
            return output if replaced else None

        return _untraced(after)

    def _is_weight(self, tensor: Tensor) -> bool:
        """True for a parameter and for a view of one."""
        return id(tensor if tensor._base is None else tensor._base) in self._parameter_ids

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
        for unit in units:
            slot = self._table.slot_of[unit]
            if not self._table.resident(unit, slot) and not self._table.free_for(unit, slot):
                slot = self._slots.take_extra_slot(unit)
            self._slots.bring(unit, slot)
            self._table.acquire(slot)
        call = _Call(tuple((unit, self._table.slot_of[unit]) for unit in units), self._generation)
        for unit in units:
            if not self._in_backward:
                self._fetch_ahead(self._ahead_in_forward, unit)
        return call

    def _begin_call_backward(self, call: _Call) -> None:
        """The gradient of an output has arrived: the call's units are about to be read again."""
        if call.in_backward:
            return
        if call.generation != self._generation:
            raise RuntimeError(STALE_WEIGHTS)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward pass with create_graph=True cannot be gone through again while weights are sharded; use "
                "ZeRO stage 2 for second derivatives"
            )
        call.in_backward = True
        self._in_backward = True
        for unit, slot in call.places:
            self._yield_slot(unit, slot)
            self._slots.bring(unit, slot)
            self._table.acquire(slot)
        self._open_backward.append(call)
        self._seen_in_backward.append(call)
        for unit, _ in call.places:
            self._fetch_ahead(self._ahead_in_backward, unit)
        if call.inputs_awaited == 0:
            self._close_if_done(call)

    def _yield_slot(self, unit: str, slot: int) -> None:
        """Make calls leave the slot that have nothing left to read there: the gradients of all their inputs are known,
        or those of all their weights (a node that makes a weight's gradient is the last to read that weight)."""
        for other in list(self._open_backward):
            over = other.inputs > 0 and other.inputs_awaited == 0
            over = over or all(unit in self._all_trainable and not self._expects_more(unit) for unit, _ in other.places)
            if over and any(name != unit and place == slot for name, place in other.places):
                self._close(other)
        if not self._table.free_for(unit, slot):
            holder = self._table.holds[slot]
            self._slots.take_extra_slot(unit)
            raise RuntimeError(
                f"unit {unit or '(root)'} is needed in backward while its gather slot is in use by "
                f"{holder or '(root)'}; it has a slot of its own now: call engine.zero_grad() and run the step again"
            )

    def _input_arrived(self, call: _Call) -> None:
        call.inputs_awaited -= 1
        self._close_if_done(call)

    def gradient_landed(self, unit: str) -> None:
        """A gradient of the unit has landed: calls that waited for it may be over."""
        entered = any(name == unit for call in self._seen_in_backward for name, _ in call.places)
        if not entered and not self._slots.owns_slot(unit):
            raise RuntimeError(
                f"a gradient reached unit {unit or '(root)'} without passing through its outputs, when its weights "
                "were not gathered; let the loss depend on an output of that module, or use ZeRO stage 2"
            )
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
        """The model is called; whatever an unfinished pass left in use is over."""
        self._stacks.clear()
        self._saved.reset()
        self._open_backward.clear()
        self._seen_in_backward.clear()
        self._in_backward = False
        self._table.users.clear()
        for slot in self._held:
            self._table.acquire(slot)

    def begin_backward(self) -> None:
        """Modules that are called from now on recompute: nothing is fetched ahead in forward order."""
        self._in_backward = True

    def finish_backward(self) -> None:
        """The backward pass is over: no call uses anything any more."""
        for call in list(self._open_backward):
            self._close(call)
        for call in self._seen_in_backward:  # the graph may have been retained, for another pass through it
            call.in_backward = call.closed = False
            call.inputs_awaited = call.inputs
        self._seen_in_backward.clear()
        self._in_backward = False

    def settle(self) -> None:
        """Wait for weights on their way: an update may rewrite the shards that they come from."""
        self._slots.settle()

    def weights_changed(self) -> None:
        """After an update: nothing in the slots is current."""
        self._slots.invalidate()
        self._saved.weights_changed()
        for slot in self._held:
            self._table.release(slot)
        self._held.clear()
        self._generation += 1

    # -- fetching ----------------------------------------------------------------------------------------------

    def _fetch_ahead(self, following: dict[str, tuple[str, ...]], unit: str) -> None:
        for ahead in following.get(unit, ()):
            slot = self._table.slot_of[ahead]
            if self._table.free_for(ahead, slot):
                self._slots.start_fetch(ahead, slot)

    # -- reads and slots beyond the plan -----------------------------------------------------------------------

    def _read_outside_of_calls(self, unit: str) -> None:
        slot = self._table.slot_of[unit]
        if torch.is_grad_enabled() and not self._slots.owns_slot(unit):
            # Autograd may save a view of it, for a node that no call announces: the slot must never be another's.
            slot = self._slots.take_extra_slot(unit)
        elif not self._table.free_for(unit, slot):
            slot = self._slots.take_extra_slot(unit)
        self._slots.bring(unit, slot)
        if torch.is_grad_enabled() and slot not in self._held:
            self._held.append(slot)
            self._table.acquire(slot)

    def _weights_of(self, name: str) -> Tensor:
        """A parameter's weights for a node that saved them: brought by its call, or now if the gradient came round
        it."""
        unit = self.plan.placement_by_name[name][0].unit
        if not self._slots.is_bound(unit):
            self._read_outside_of_calls(unit)
        return self.state.parameters[name].detach()

    def close(self) -> None:
        """Remove the hooks and give the slots back. Parameters keep their shapes and read as NaN."""
        for handle in self._handles:
            handle.remove()
        for module in self._guarded:
            module._parameters = dict(module._parameters)
        self._slots.close()


def _following(order: Sequence[str], count: int) -> dict[str, tuple[str, ...]]:
    """Unit -> the units that come next in this order."""
    return {unit: tuple(order[index + 1 : index + 1 + count]) for index, unit in enumerate(order)}


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which torch.compile must not try to look into."""
    return cast(Callable[..., Any], torch.compiler.disable(hook))
