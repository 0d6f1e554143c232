"""Collectives over shared pages: every rank reads its peers' inputs where they lie.

A call writes a record, says that it has arrived, and returns; see the note in `board` for what follows. An
input is read where it lies if that is in a shared allocation of the group; a small one travels through a
mailbox instead, which frees it at once, and any other through staging pages that peers map when they meet
them. Outputs may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work
from windlass.backends.cpu.board import Board
from windlass.backends.cpu.control_page import NOWHERE, ControlPage, InputPlace
from windlass.backends.cpu.meetings import Meetings
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.reductions import reduce_in_order
from windlass.backends.cpu.regions import Region, name_region
from windlass.backends.cpu.shared_pages import Door, Pages, create_pages
from windlass.backends.cpu.transport import Call, Transport, check_splits, copy_into, parts


class SharedTransport(Transport):
    """One group whose ranks all run on this host. Peers and control pages come by index in the group."""

    name = "shared pages"

    def __init__(self, group: Group, peers: Sequence[Peer], control: Sequence[Pages], door: Door, board: Board) -> None:
        super().__init__(group)
        self._door = door
        self._board = board
        self._control = [ControlPage(pages, group.size) for pages in control]
        self._meetings = Meetings(group, peers, self._control, door, board)
        self._read = self._meetings.inputs.read

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        def move(number: int) -> None:
            for index, part in self._from_own_on(parts(output, self.group)):
                if index == self.group.rank:
                    copy_into(part, input)
                elif part.numel():
                    part.copy_(self._read(number, index, input.numel(), input.dtype))

        return self._meetings.enter(call, input, move)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        def move(number: int) -> None:
            if output.numel():
                terms = [self._read(number, index, input.numel(), input.dtype) for index in range(self.group.size)]
                reduce_in_order(output, [parts(term, self.group)[self.group.rank] for term in terms], op)

        return self._meetings.enter(call, input, move)

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        def move(number: int) -> None:
            rows = [control.read_splits(number) for control in self._control]
            check_splits(call, self.group, rows)
            for index, part in self._from_own_on(torch.split(output, list(output_splits))):
                if part.numel():
                    begin = sum(rows[index][: self.group.rank])
                    end = begin + part.numel()
                    copy_into(part, self._read(number, index, end, input.dtype)[begin:])

        return self._meetings.enter(call, input, move, splits=(*input_splits, *output_splits))

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        def move(number: int) -> None:
            if tensor.numel():
                everyone = range(self.group.size)
                terms = [self._read(number, index, tensor.numel(), tensor.dtype) for index in everyone]
                reduce_in_order(tensor, terms, op)

        return self._meetings.enter(call, tensor, move, copied=True)

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        def move(number: int) -> None:
            if source != self.group.rank and tensor.numel():
                tensor.copy_(self._read(number, source, tensor.numel(), tensor.dtype))

        return self._meetings.enter(call, tensor if source == self.group.rank else None, move)

    def barrier(self, call: Call) -> None:
        self._meetings.enter(call, None, lambda number: None).wait()

    def fetch(self, output: Tensor, shard: Tensor) -> Work | None:
        """Copy the shards from where they lie, with nobody taking part; None if this one is not shared.

        The allocation is the same on all ranks. A shard lies at the same offset in it on all of them, or, where
        the shard is this rank's part of the output, the outputs do.
        """
        located = self._board.regions.locate(shard)
        if located is None or not located[0].serves(self.group):
            return None
        self._board.check()
        region, offset = located
        targets = parts(output, self.group)
        in_place = targets[self.group.rank].data_ptr() == shard.data_ptr()
        for index, part in self._from_own_on(targets):
            pages = region.pages_of(self.group.ranks[index])
            moved = (index - self.group.rank) * shard.nbytes if in_place else 0
            if index != self.group.rank or not in_place:
                part.copy_(pages.view(offset + moved, shard.numel(), shard.dtype))
        return DoneWork()

    def allocate(self, nbytes: int, dtype: torch.dtype, tag: str, refused: bool) -> Region:
        """Pages of `nbytes` that every rank of the group maps. All call it, and wait for one another.

        Raises OSError on every rank if one cannot have its pages, or has `refused` to.
        """
        own: Pages | None = None
        cause: OSError | None = None
        if not refused:
            try:
                own = create_pages(nbytes, self._door)
            except OSError as error:
                cause = error  # told to the others first
        mapped: list[Pages] = []
        without: list[int] = []
        numbers: list[int] = []

        def move(number: int) -> None:
            numbers.append(number)
            for index, control in enumerate(self._control):
                place = control.read_place(number)
                if not place.path:
                    without.append(self.group.ranks[index])
                elif index == self.group.rank:
                    mapped.extend([own] if own is not None else [])
                else:
                    mapped.append(self._meetings.inputs.open(index, place))

        try:
            place = InputPlace(NOWHERE, nbytes=nbytes, path=own.path if own is not None else "")
            work = self._meetings.enter(Call("allocation", tag, nbytes, dtype), None, move, place=place)
            self._meetings.finish_everywhere(work)
        finally:
            if own is not None:
                own.seal()
        if without:
            raise OSError(f"rank {without[0]} has no room for its part of the allocation") from cause
        region = Region(name_region(self.group, numbers[0]), self.group, tuple(mapped))
        self._board.regions.add(region)
        return region

    def release(self, region: Region) -> None:
        """Unmap a region, once nothing under way reads it."""
        self._meetings.finish_entered()
        self._board.regions.remove(region)

    def finish(self) -> None:
        self._meetings.finish_entered(until_read=True)

    def close(self) -> None:
        self._meetings.close()

    def _from_own_on(self, tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """With their indices, from this rank's own on: so that ranks do not all read from the same peer."""
        order = [(self.group.rank + step) % self.group.size for step in range(self.group.size)]
        return [(index, tensors[index]) for index in order]
