"""What a transport offers to the collectives facet, and the one that needs no peer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.errors import CollectiveMismatch
from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work

_DTYPES: Final = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
_KINDS: Final = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "broadcast", "barrier", "allocation")
_OPS: Final = ("", "sum", "max")


@dataclass(frozen=True)
class Call:
    """What all ranks must agree on when they meet."""

    kind: str
    tag: str
    nbytes: int  # of the input; -1 where ranks may differ
    dtype: torch.dtype  # of the input
    output_dtype: torch.dtype | None = None
    op: str = ""
    source: int = -1  # index in the group of the rank that sends

    @cached_property
    def words(self) -> tuple[int, ...]:
        """The same as six integers of 64 bits; equal calls have equal words."""
        digest = hashlib.blake2b(self.tag.encode(), digest_size=8).digest()
        dtypes = _DTYPES.index(self.dtype) * 64 + _DTYPES.index(self.output_dtype or self.dtype)
        tag = int.from_bytes(digest, "little", signed=True)
        return (_KINDS.index(self.kind), tag, self.nbytes, dtypes, _OPS.index(self.op), self.source)

    def __str__(self) -> str:
        return _label(self.kind, self.tag)


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError for a dtype that cannot travel."""
    if dtype not in _DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        raise ValueError(f"collectives carry {known}, not {str(dtype).removeprefix('torch.')}")


def describe(words: Sequence[int], tag: str) -> str:
    """A call in words: "reduce_scatter 'gradients' of 4096 bytes of float32"."""
    kind, _, nbytes, dtypes, op, source = words
    wide, narrow = divmod(dtypes, 64)
    text = _label(_KINDS[kind], tag)
    if _KINDS[kind] == "barrier":
        return text
    text += f" of {nbytes} bytes of" if nbytes >= 0 else " of"
    text += f" {str(_DTYPES[wide]).removeprefix('torch.')}"
    text += f" into {str(_DTYPES[narrow]).removeprefix('torch.')}" if narrow != wide else ""
    text += " (max)" if _OPS[op] == "max" else ""
    return text + (f" from index {source}" if source >= 0 else "")


def describe_mismatch(one: int, call: str, other: int, other_call: str) -> str:
    return f"rank {one} called {call}, rank {other} called {other_call}: all ranks of a group must make the same calls"


def check_splits(call: Call, group: Group, rows: Sequence[Sequence[int]]) -> None:
    """CollectiveMismatch, the same on every rank, unless each rank expects what the others send it.

    Row i holds what rank i sends to each rank, then what it expects from each.
    """
    for sender, row in enumerate(rows):
        for receiver, sent in enumerate(row[: group.size]):
            expected = rows[receiver][group.size + sender]
            if sent != expected:
                raise CollectiveMismatch(
                    f"rank {group.ranks[sender]} sends {sent} elements to rank {group.ranks[receiver]} in {call}, "
                    f"which expects {expected}: the splits of all ranks must fit together"
                )


def _label(kind: str, tag: str) -> str:
    return f"{kind} {tag!r}" if tag else kind


def parts(tensor: Tensor, group: Group) -> list[Tensor]:
    """The tensor cut into one equal part per rank."""
    size = tensor.numel() // group.size
    return [tensor[index * size : (index + 1) * size] for index in range(group.size)]


def copy_into(output: Tensor, source: Tensor) -> None:
    """Copy unless both are the same memory, as the in-place forms allow."""
    if output.numel() and output.data_ptr() != source.data_ptr():
        output.copy_(source)


class Transport(ABC):
    """Moves the bytes of one group. Arguments are checked and calls are counted by the facet above."""

    name: str

    def __init__(self, group: Group) -> None:
        self.group = group

    @abstractmethod
    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work: ...

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work: ...

    @abstractmethod
    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work: ...

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work: ...

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work: ...

    @abstractmethod
    def barrier(self, call: Call) -> None: ...

    def finish(self) -> None:
        """Wait for every call that was entered."""
        return None

    def close(self) -> None:
        """Leave the group without waiting for anybody."""
        return None

    def exchange(self, text: str) -> list[str]:
        """A short text of every rank, by rank."""
        encoded = text.encode()
        row = 2048
        if len(encoded) > row - 2:
            raise ValueError(f"an exchange carries at most {row - 2} bytes per rank, got {len(encoded)}")
        mine = torch.zeros(row, dtype=torch.uint8, device="cpu")
        framed = len(encoded).to_bytes(2, "little") + encoded
        mine[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        everyone = torch.empty(row * self.group.size, dtype=torch.uint8, device="cpu")
        self.all_gather(everyone, mine, Call("all_gather", "exchange", row, torch.uint8)).wait()
        rows = [bytes(part.tolist()) for part in parts(everyone, self.group)]
        return [one[2 : 2 + int.from_bytes(one[:2], "little")].decode() for one in rows]


class AloneTransport(Transport):
    """A group of one: every collective is a copy at most."""

    name = "alone"

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        copy_into(output, input)
        return DoneWork()

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        if output.dtype == input.dtype:
            copy_into(output, input)
        else:
            output.copy_(input)
        return DoneWork()

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        copy_into(output, input)
        return DoneWork()

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        return DoneWork()

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        return DoneWork()

    def barrier(self, call: Call) -> None:
        return None
