"""Worlds of XLA replicas without other processes: a host transport that knows what all ranks would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work
from windlass.backends.cpu.transport import Call, Transport
from windlass.backends.xla.in_graph import InGraphTransport, Partitions

Ranks = tuple[int, ...]


class AgreeingHost(Transport):
    """Agrees with every call, and answers for the other ranks with what it was given."""

    name = "agreeing"

    def __init__(self, group: Group, rows: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(group)
        self.rows = [list(row) for row in rows]
        self.agreed: list[str] = []

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        assert input.tolist() == self.rows[self.group.rank]
        output.copy_(torch.tensor(self.rows).view(-1))
        return DoneWork()

    def barrier(self, call: Call) -> None:
        self.agreed.append(str(call))

    def exchange(self, text: str) -> list[str]:
        return [text] * self.group.size

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        raise AssertionError("the host reduces nothing")

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        raise AssertionError("the host exchanges no tensors")

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        raise AssertionError("the host reduces nothing")

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        raise AssertionError("the host broadcasts nothing")


def make_transport(
    groups: Sequence[Ranks],  # of one partition, in the order in which they are made
    rank: int,  # of the world
    rows: Sequence[Sequence[int]] = (),  # what the ranks of the group say about their splits
) -> InGraphTransport:
    """The transport of one rank, in the group of the partition that it is in."""
    partitions = Partitions(range(sum(len(ranks) for ranks in groups)))
    joined = [partitions.join(ranks) for ranks in groups]
    mine = next(index for index, ranks in enumerate(groups) if rank in ranks)
    group = Group(f"group {mine}", groups[mine], groups[mine].index(rank))
    return InGraphTransport(group, joined[mine], AgreeingHost(group, rows))
