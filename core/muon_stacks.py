"""Directions where every rank runs one program: matrices where they lie, or brought together in stacks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional

from windlass.core.muon import TAG, orthogonalise
from windlass.core.muon_tables import Stack, StackLayout, StackTables, make_tables
from windlass.core.muon_uniform_planner import Slot, divide_work
from windlass.core.specs import dtype_from_name
from windlass.core.state import ModelState

_Place = tuple[str, Slot]  # region, slot


class StackedDirections:
    """Replaces update inputs by their orthogonal directions, one program on all ranks."""

    def __init__(self, state: ModelState) -> None:
        plan = state.plan
        assert plan.muon is not None
        self._state = state
        self._muon = plan.muon
        self._dtype = dtype_from_name(plan.muon.rules.direction_dtype)
        self._work = divide_work(plan.muon.each, plan.region_by_name, replicated=plan.rules.update == "replicated")
        self._tables: StackTables | None = None
        if self._work.layout is not None:
            made = make_tables(self._work.layout, self._work.shared, state.group.size, state.group.rank)
            tables = [getattr(made, one.name).to(state.accelerator.device) for one in fields(made)]
            self._tables = StackTables(*tables)

    def find(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Directions by region, of update inputs by region, each as long as what this rank holds. A collective."""
        found = dict(inputs)
        if self._work.layout is not None and self._tables is not None:
            found.update(self._exchange(self._work.layout, self._tables, inputs))
        by_shape: dict[tuple[int, int], list[_Place]] = defaultdict(list)
        for region, slots in self._work.slots.items():
            for slot in slots:
                by_shape[slot.rows, slot.columns].append((region, slot))
        directions: dict[_Place, Tensor] = {}
        for (rows, columns), places in by_shape.items():
            matrices = [found[region][slot.start : slot.stop].view(rows, columns) for region, slot in places]
            worked = [
                one for batch in self._batches(len(places), rows * columns) for one in self._work_on(matrices[batch])
            ]
            directions.update(zip(places, worked, strict=True))
        for region, slots in self._work.slots.items():
            found[region] = _replace(found[region], {slot: directions[region, slot] for slot in slots})
        return found

    # -- brought together --------------------------------------------------------------------------------------

    def _exchange(self, layout: StackLayout, tables: StackTables, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = [inputs[region.name] for region in layout.regions]
        held = torch.cat(parts).view(-1, layout.block)
        received = held if layout.replicated else torch.cat([*self._send(layout, held, tables.send), held])
        stacked = received.index_select(0, tables.take)
        worked = torch.cat([self._orthogonalise_stack(layout, stack, stacked) for stack in layout.stacks])
        if layout.replicated:
            returned = torch.cat([self._gather(layout, worked), held])
        else:
            returned = torch.cat([*self._send(layout, worked, tables.give), worked, held])
        landed = returned.index_select(0, tables.land).view(-1).split([part.numel() for part in parts])
        return {region.name: one for region, one in zip(layout.regions, landed, strict=True)}

    def _send(self, layout: StackLayout, blocks: Tensor, table: Tensor) -> list[Tensor]:
        """What the other ranks send while this one sends them the blocks of the table: equal parts, as everywhere."""
        if not layout.part:
            return []
        memory, group = self._state.accelerator.memory, self._state.group
        splits = [layout.part * layout.block] * group.size
        sent, received = (memory.empty((sum(splits),), self._dtype, tag=TAG, shared=group) for _ in range(2))
        sent.copy_(blocks.index_select(0, table).view(-1))
        self._state.accelerator.collectives.all_to_all(received, sent, splits, splits, group, tag=TAG).wait()
        result = received.clone().view(-1, layout.block)
        for tensor in (sent, received):
            memory.release(tensor, after=self._state.accelerator.streams.record())
        return [result]

    def _gather(self, layout: StackLayout, worked: Tensor) -> Tensor:
        """All ranks' stacks, one rank after the other."""
        memory, group = self._state.accelerator.memory, self._state.group
        everything = memory.empty((group.size * worked.numel(),), self._dtype, tag=TAG, shared=group)
        self._state.accelerator.collectives.all_gather(everything, worked.view(-1), group, tag=TAG).wait()
        result = everything.clone().view(-1, layout.block)
        memory.release(everything, after=self._state.accelerator.streams.record())
        return result

    def _orthogonalise_stack(self, layout: StackLayout, stack: Stack, blocks: Tensor) -> Tensor:
        """[count * blocks, block]: directions in the place of the matrices."""
        numel, padded = stack.rows * stack.columns, stack.blocks * layout.block
        matrices = blocks[stack.first : stack.stop].reshape(stack.count, padded)[:, :numel]
        matrices = matrices.reshape(stack.count, stack.rows, stack.columns)
        found = [self._orthogonalise(matrices[batch]) for batch in self._batches(stack.count, numel)]
        flat = torch.cat(found).view(stack.count, numel)
        return functional.pad(flat, (0, padded - numel)).view(-1, layout.block)

    # -- matrices ----------------------------------------------------------------------------------------------

    def _batches(self, count: int, numel: int) -> list[slice]:
        """Of equal matrices that one kernel call takes."""
        most = self._muon.batch_size(numel)
        return [slice(first, min(first + most, count)) for first in range(0, count, most)]

    def _work_on(self, matrices: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._orthogonalise(torch.stack(list(matrices))).unbind()

    def _orthogonalise(self, stack: Tensor) -> Tensor:
        form = self._muon.form_of(stack.shape[1], stack.shape[2])
        return orthogonalise(stack, form, self._muon.rules, self._state.accelerator)


def _replace(vector: Tensor, directions: Mapping[Slot, Tensor]) -> Tensor:
    """The vector with the directions in their slots, which are in order."""
    pieces, position = [], 0
    for slot, direction in directions.items():
        if slot.start > position:
            pieces.append(vector[position : slot.start])
        pieces.append(direction.reshape(-1))
        position = slot.stop
    if position < vector.numel():
        pieces.append(vector[position:])
    return torch.cat(pieces)
