"""Directions of update inputs: worked out by the owners, and brought to whoever holds the rows.

[Note: waves] A matrix that its owner holds whole is worked on where it lies. The others come in waves: while the owners
work on wave k, the inputs of wave k + 1 travel to them, and the directions of wave k - 1 travel back. Each wave is one
all-to-all each way, whatever it holds; splits follow from the plan, so ranks need not agree on anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.accelerator.interface import Work
from windlass.core.captured import Issuer
from windlass.core.muon import TAG, orthogonalise
from windlass.core.muon_plan import EVERYONE, Matrix, MuonPlan
from windlass.core.muon_waves import Wave, cut_wave
from windlass.core.specs import dtype_from_name
from windlass.core.state import ModelState

_Batch = tuple[int, int, int]  # matrices, rows, columns


class Directions(ABC):
    """Replaces update inputs by their orthogonal directions. `inputs[region]` covers `state.owned_bounds(region)`."""

    def __init__(self, state: ModelState, issuer: Issuer) -> None:
        assert state.plan.muon is not None
        self.state = state
        self.muon: MuonPlan = state.plan.muon
        self._issuer = issuer
        self._dtype = dtype_from_name(self.muon.rules.direction_dtype)
        self._live: dict[int, Tensor] = {}  # what was allocated and not given back, by id

    @abstractmethod
    def find(self, inputs: Mapping[str, Tensor], touched: set[str]) -> None:
        """Of the parameters in `touched`, which is the same set on every rank. In place. A collective."""

    def close(self) -> None:
        """Give back what an update that failed has left."""
        while self._live:
            self.state.accelerator.memory.release(self._live.popitem()[1])

    def work_on(self, flat: Sequence[tuple[Matrix, Tensor]]) -> None:
        """Orthogonalise matrices in place, each given flat: equal shapes in one kernel call, a batch at a time."""
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for one, tensor in flat:
            by_shape[one.rows, one.columns].append(tensor)
        batches: list[_Batch] = []
        for (rows, columns), tensors in by_shape.items():
            most = self.muon.batch_size(rows * columns)
            batches += [(min(most, len(tensors) - first), rows, columns) for first in range(0, len(tensors), most)]
        if batches:
            tensors = [tensor for same in by_shape.values() for tensor in same]
            self._issuer.run("directions", self._orthogonalise, tuple(batches), tensors)

    def _orthogonalise(self, batches: tuple[_Batch, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """A function of its tensors, into which it writes; it may be captured."""
        done = 0
        for count, *shape in batches:
            own = [tensor.view(1, *shape) for tensor in tensors[done : done + count]]
            stack = own[0] if count == 1 else torch.cat(own)
            found = orthogonalise(stack, self.muon.form_of(*shape), self.muon.rules, self.state.accelerator)
            for tensor, direction in zip(own, found.split(1), strict=True):
                tensor.copy_(direction)
            done += count
        return []

    def _allocate(self, numel: int, *, shared: bool = True) -> Tensor:
        group = self.state.group if shared else None
        tensor = self.state.accelerator.memory.empty((numel,), self._dtype, tag=TAG, shared=group)
        self._live[id(tensor)] = tensor
        return tensor

    def _free(self, tensor: Tensor) -> None:
        self.state.accelerator.memory.release(self._live.pop(id(tensor)), after=self.state.accelerator.streams.record())

    def _slice(self, inputs: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a region, which this rank holds."""
        first, _ = self.state.owned_bounds(self.state.plan.region_by_name[name])
        return inputs[name][start - first : stop - first]

    def _whole(self, inputs: Mapping[str, Tensor], indices: Iterable[int]) -> list[tuple[Matrix, Tensor]]:
        """Matrices that this rank holds whole, with their elements."""
        chosen = [self.muon.each[index] for index in indices]
        return [(one, self._slice(inputs, one.region, one.start, one.stop)) for one in chosen]


class ExchangedDirections(Directions):
    """Where every rank holds its shard."""

    def __init__(self, state: ModelState, issuer: Issuer) -> None:
        super().__init__(state, issuer)
        self._touched: set[str] | None = None
        self._waves: list[Wave] = []  # of what was touched last
        self._local: list[int] = []

    def find(self, inputs: Mapping[str, Tensor], touched: set[str]) -> None:
        self._prepare(touched)
        waves = self._waves
        coming = self._send_inward(inputs, waves[0]) if waves else None
        self.work_on(self._whole(inputs, self._local))
        going: _Flight | None = None
        for number, wave in enumerate(waves):
            assert coming is not None
            following = self._send_inward(inputs, waves[number + 1]) if number + 1 < len(waves) else None
            returned = self._send_outward(wave, self._assemble(wave, coming))
            if going is not None:
                self._land(inputs, waves[number - 1], going)
            coming, going = following, returned
        if going is not None:
            self._land(inputs, waves[-1], going)

    def _prepare(self, touched: set[str]) -> None:
        """What follows from the plan and from what was touched, which seldom changes."""
        if touched == self._touched:
            return
        self._touched = set(touched)
        rank, each = self.state.group.rank, self.muon.each
        chosen = [[each[index] for index in wave if each[index].name in touched] for wave in self.muon.waves]
        self._waves = [cut_wave(self.state.plan, wave, rank) for wave in chosen if wave]
        self._local = [i for i in self.muon.local if each[i].owner == rank and each[i].name in touched]

    def _send_inward(self, inputs: Mapping[str, Tensor], wave: Wave) -> _Flight:
        sent = self._allocate(wave.most_held)
        for piece in wave.held:
            size = piece.stop - piece.start
            source = self._slice(inputs, piece.region, piece.start, piece.stop)
            sent[piece.place : piece.place + size].copy_(source)
        return self._send(sent, self._allocate(wave.most_owned), wave.held_splits, wave.owned_splits, "gather")

    def _assemble(self, wave: Wave, flight: _Flight) -> Tensor:
        """This rank's matrices of the wave one after the other, orthogonalised."""
        flight.work.wait()
        numel = sum(one.numel for one in wave.matrices)
        matrices = self._allocate(numel, shared=False)
        for piece in wave.owned:
            size = piece.stop - piece.start
            matrices[piece.start : piece.stop].copy_(flight.received[piece.place : piece.place + size])
        self._release(flight)
        flat, start = [], 0
        for one in wave.matrices:
            flat.append((one, matrices[start : start + one.numel]))
            start += one.numel
        self.work_on(flat)
        return matrices

    def _send_outward(self, wave: Wave, matrices: Tensor) -> _Flight:
        sent = self._allocate(wave.most_owned)
        for piece in wave.owned:
            size = piece.stop - piece.start
            sent[piece.place : piece.place + size].copy_(matrices[piece.start : piece.stop])
        self._free(matrices)
        return self._send(sent, self._allocate(wave.most_held), wave.owned_splits, wave.held_splits, "reduce")

    def _land(self, inputs: Mapping[str, Tensor], wave: Wave, flight: _Flight) -> None:
        flight.work.wait()
        for piece in wave.held:
            size = piece.stop - piece.start
            target = self._slice(inputs, piece.region, piece.start, piece.stop)
            target.copy_(flight.received[piece.place : piece.place + size])
        self._release(flight)

    def _send(self, sent: Tensor, received: Tensor, to: Sequence[int], of: Sequence[int], lane: str) -> _Flight:
        streams, collectives = self.state.accelerator.streams, self.state.accelerator.collectives
        written = streams.record()
        with streams.lane(lane):
            streams.wait(written)
            work = collectives.all_to_all(received[: sum(of)], sent[: sum(to)], of, to, self.state.group, tag=TAG)
        return _Flight(sent, received, work)

    def _release(self, flight: _Flight) -> None:
        self._free(flight.sent)
        self._free(flight.received)


@dataclass(frozen=True)
class _Flight:
    """One all-to-all: what it sends, and where it lands."""

    sent: Tensor
    received: Tensor
    work: Work


class SharedDirections(Directions):
    """Where every rank has all update inputs: owners work and send to everybody, or everybody works."""

    def find(self, inputs: Mapping[str, Tensor], touched: set[str]) -> None:
        group, each = self.state.group, self.muon.each
        present = [one for one in each if one.name in touched]
        own = [one.index for one in present if one.owner in (group.rank, EVERYONE)]
        self.work_on(self._whole(inputs, own))
        shared = [one for one in present if one.owner != EVERYONE]
        if group.size == 1 or not shared:
            return
        by_rank: list[list[Matrix]] = [[] for _ in range(group.size)]
        for one in shared:
            by_rank[one.owner].append(one)
        largest = max(sum(one.numel for one in part) for part in by_rank)
        everything = self._allocate(group.size * largest)
        mine = everything[group.rank * largest : (group.rank + 1) * largest]
        position = 0
        for _, direction in self._whole(inputs, [one.index for one in by_rank[group.rank]]):
            mine[position : position + direction.numel()].copy_(direction)
            position += direction.numel()
        mine[position:].zero_()
        self.state.accelerator.collectives.all_gather(everything, mine, group, tag=TAG).wait()
        for rank, part in enumerate(by_rank):
            position = rank * largest
            for one, direction in self._whole(inputs, [one.index for one in part]) if rank != group.rank else ():
                direction.copy_(everything[position : position + one.numel])
                position += one.numel
        self._free(everything)


def open_directions(state: ModelState, issuer: Issuer) -> Directions:
    """What the plan's rules ask for."""
    kind = SharedDirections if state.plan.rules.update == "replicated" else ExchangedDirections
    return kind(state, issuer)
