"""Collectives inside the XLA program, for devices that meet by themselves: TPUs.

Nothing runs at a call. It adds an instruction to the pending program and writes the output in it; whoever uses the
output depends on the instruction, so every work is done at once. The host's transport carries what is not numbers on
the device: texts, barriers, and the agreement of the ranks on each call before its first use. What goes wrong later,
inside a running program, is found by the device's own timeout.

[Note: one program] All ranks run one program, so nothing in it may depend on the rank. An instruction names all groups
that meet in it, and XLA wants them of equal size; hence groups that are a part of the world are made as partitions of
it, one after the other: all shards of an axis, then all of the next. Splits that differ between ranks are read from
indices, which are data. What a rank keeps is never found at an offset of its own.

[Note: tokens] torch_xla keeps collectives in order by a number that is 0: it adds the number to every input, and
multiplies it by the first element of every result. An infinity there, such as an overflow in a gradient, makes it NaN,
and with it all that is gathered later in the step, weights included. So the numbers are turned off by the variable
that torch_xla has for it; should a program have been lowered before, they are at least started anew for each call.
Order needs none of this: it is the same wherever the program is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.environment import prefer_variable
from windlass.accelerator.errors import BackendUnusable, Unsupported
from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work
from windlass.backends.cpu.transport import Call, Transport, check_splits

_LANES: Final = 128  # of a TPU's vector registers: flat operands of other shapes take more memory there
_NO_TOKENS: Final = "DISABLE_NUMERIC_CC_TOKEN"


@dataclass(eq=False)
class Partition:
    """Groups that meet in the same instruction: disjoint, of one size, and all of the world once it is complete."""

    ordinals: tuple[int, ...]  # what XLA calls each rank of the world
    groups: list[tuple[int, ...]] = field(default_factory=list)  # of ranks

    def takes(self, ranks: Sequence[int]) -> bool:
        """Whether one more group may meet together with these."""
        return all(len(other) == len(ranks) and not set(other) & set(ranks) for other in self.groups)

    def replica_groups(self, group: Group) -> list[list[int]]:
        """The groups in XLA's numbers; `Unsupported` while some rank of the world is in none."""
        missing = sorted(set(range(len(self.ordinals))) - {rank for ranks in self.groups for rank in ranks})
        if missing:
            raise Unsupported(
                f"group {group.name!r} of ranks {list(group.ranks)} cannot meet inside an XLA program, which all ranks "
                f"run: no group of the same size, made right after it, has ranks {missing}; make the groups of an "
                "axis one after the other, until every rank is in one"
            )
        return [[self.ordinals[rank] for rank in ranks] for ranks in self.groups]


class Partitions:
    """The partitions of a world, found in the order in which its groups are made, which is the same on all ranks."""

    def __init__(self, ordinals: Sequence[int]) -> None:
        self._ordinals = tuple(ordinals)
        self._partitions: list[Partition] = []

    def join(self, ranks: Sequence[int]) -> Partition:
        """Where a new group meets: with the same ranks under another name, in the partition that was begun last if
        it fits there, or in a new one."""
        members = tuple(ranks)
        for partition in self._partitions:
            if members in partition.groups:
                return partition
        if not self._partitions or not self._partitions[-1].takes(members):
            self._partitions.append(Partition(self._ordinals))
        self._partitions[-1].groups.append(members)
        return self._partitions[-1]


def exchange_ordinals(host: Transport) -> tuple[int, ...]:
    """What XLA calls each rank of the world, by rank. `BackendUnusable` unless its replicas are the job's ranks."""
    import torch_xla.runtime

    size = torch_xla.runtime.world_size()
    texts = host.exchange(f"{torch_xla.runtime.global_ordinal()} {size}")
    ordinals = tuple(int(text.split()[0]) for text in texts)
    if sorted(ordinals) != list(range(size)) or len(ordinals) != size:
        raise BackendUnusable(
            f"the {len(texts)} ranks of this job are replicas {list(ordinals)} of an XLA program of {size}: start one "
            "process per device, and set what tells them of each other (TPU_PROCESS_ADDRESSES and its kin)"
        )
    return ordinals


class InGraphTransport(Transport):
    """One group of at least two ranks. Sums of 16 bits are made in fp32 and rounded once."""

    name = "in graph"

    def __init__(self, group: Group, partition: Partition, host: Transport) -> None:
        """`host` moves host memory between the same ranks in the same order."""
        super().__init__(group)
        prefer_variable(_NO_TOKENS, "1")  # see the note on tokens; read when the first collective is lowered
        self._partition = partition
        self._host = host
        self._agreed: set[tuple[int, ...]] = set()
        self._exchanges: dict[tuple[str, tuple[int, ...], tuple[int, ...]], _Exchange] = {}

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        self._agree(call)
        if input.numel():
            output.copy_(self._gather(input))
        return DoneWork()

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        self._agree(call)
        if output.numel():
            terms = _as_rows(input.to(_sum_dtype(output.dtype)), output.numel())
            output.copy_(self._meet("reduce_scatter", op, terms, 1.0, 0, self.group.size))
        return DoneWork()

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        self._agree(call)
        key = (call.tag, tuple(input_splits), tuple(output_splits))
        if key not in self._exchanges:
            rows = self._gather_splits(input_splits, output_splits, call)
            self._exchanges[key] = _plan_exchange(call, self.group, rows, input.device)
        exchange = self._exchanges[key]
        if exchange.part:
            sent = input if exchange.send is None else torch.index_select(input, 0, exchange.send)
            received = self._exchange(sent)
            output.copy_(received if exchange.keep is None else torch.index_select(received, 0, exchange.keep))
        return DoneWork()

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        self._agree(call)
        if tensor.numel():
            tensor.copy_(self._meet("all_reduce", op, tensor.to(_sum_dtype(tensor.dtype))))
        return DoneWork()

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        """Everybody gets a part of the source's tensor, then the parts are gathered: twice the bytes, every dtype to
        the bit, and the source is a row of the program, not a mask of the rank."""
        self._agree(call)
        if tensor.numel():
            part = -(-tensor.numel() // self.group.size)
            padding = tensor.new_zeros(part * self.group.size - tensor.numel())
            received = self._exchange(torch.cat([tensor, padding]) if padding.numel() else tensor)
            tensor.copy_(self._gather(received[source * part : (source + 1) * part])[: tensor.numel()])
        return DoneWork()

    def barrier(self, call: Call) -> None:
        self._host.barrier(call)

    def exchange(self, text: str) -> list[str]:
        return self._host.exchange(text)

    # ---- what the calls are made of

    def _gather(self, part: Tensor) -> Tensor:
        return self._meet("all_gather", _as_rows(part, part.numel()), 0)

    def _exchange(self, sent: Tensor) -> Tensor:
        """Part i goes to rank i; what comes from rank i is part i."""
        size = self.group.size
        return self._meet("all_to_all", _as_rows(sent, sent.numel() // size), 0, 0, size)

    def _meet(self, function: str, *arguments: object) -> Tensor:
        """One of torch_xla's collective functions over the groups of the partition; its result is flat."""
        import torch_xla
        import torch_xla.core.xla_model as model

        groups = self._partition.replica_groups(self.group)
        result: Tensor = getattr(model, function)(*arguments, groups=groups, pin_layout=False)
        torch_xla._XLAC._set_all_reduce_token(str(result.device), None)  # see the note on tokens
        return result.view(-1)

    def _agree(self, call: Call) -> None:
        """Meet on the host before the first use of a call, where what does not match, or come, is found and named."""
        self._partition.replica_groups(self.group)
        if call.words not in self._agreed:
            self._host.barrier(call)
            self._agreed.add(call.words)

    def _gather_splits(self, input_splits: Sequence[int], output_splits: Sequence[int], call: Call) -> list[list[int]]:
        mine = torch.tensor([*input_splits, *output_splits], dtype=torch.int64, device="cpu")
        everyone = torch.empty(mine.numel() * self.group.size, dtype=torch.int64, device="cpu")
        asked = Call("all_gather", f"splits of {call.tag}", mine.nbytes, torch.int64)
        self._host.all_gather(everyone, mine, asked).wait()
        rows: list[list[int]] = everyone.view(self.group.size, -1).tolist()
        return rows


@dataclass(frozen=True)
class _Exchange:
    """An all-to-all in equal parts: which elements are sent, and which are kept of those received; None for all."""

    part: int
    send: Tensor | None = None
    keep: Tensor | None = None


def _plan_exchange(call: Call, group: Group, rows: Sequence[Sequence[int]], device: torch.device) -> _Exchange:
    """Splits as equal parts, the largest of all ranks'. Row i holds what rank i sends, then what it receives.

    Only this group is asked: groups that meet in one instruction must have the same largest split and lengths.
    `CollectiveMismatch` if they do not fit together, `Unsupported` where one program cannot hold them.
    """
    check_splits(call, group, rows)
    size = group.size
    part = max(max(row) for row in rows)
    if all(split == part for row in rows for split in row):
        return _Exchange(part)
    for what, lengths in (
        ("inputs", [sum(row[:size]) for row in rows]),
        ("outputs", [sum(row[size:]) for row in rows]),
    ):
        if len(set(lengths)) > 1:
            raise Unsupported(
                f"{call} has {what} of {lengths} elements, and all ranks run one XLA program, whose shapes are fixed: "
                "pad them to one length on every rank"
            )
    mine, begin = rows[group.rank], 0
    dtype = torch.int32 if size * part < 2**31 else torch.int64  # a TPU computes with 32 bits
    send = torch.zeros(size * part, dtype=dtype, device="cpu")  # element 0 fills parts up, and is not kept
    for index, split in enumerate(mine[:size]):
        send[index * part : index * part + split] = torch.arange(begin, begin + split, device="cpu")
        begin += split
    kept = [torch.arange(index * part, index * part + split, device="cpu") for index, split in enumerate(mine[size:])]
    return _Exchange(part, send.to(device), torch.cat(kept).to(dtype).to(device))


def _as_rows(tensor: Tensor, part: int) -> Tensor:
    """Rows of a register's width where each part of the tensor is made of such; else the flat tensor."""
    return tensor.view(-1, _LANES) if part % _LANES == 0 else tensor


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
