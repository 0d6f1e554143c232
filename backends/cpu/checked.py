"""The collectives over one transport for each group: arguments checked, bytes counted, then handed on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.interface import Collectives, Group, ReduceOp, Work
from windlass.backends.cpu.arguments import check_op, check_overlap, check_tensors, overlap
from windlass.backends.cpu.transport import Call, Transport


class CheckedCollectives(Collectives):
    """What facets have in common that move bytes by transports.

    A subclass enters each group's transport in `_transports`, says what the world is, and where tensors must lie.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._transports: dict[tuple[str, tuple[int, ...]], Transport] = {}
        self._closed = False

    def all_gather(self, output: Tensor, input: Tensor, group: Group, *, tag: str = "") -> Work:
        transport = self._transport(group)
        output, input = self._check("all_gather", tag, output, input)
        if output.numel() != group.size * input.numel() or output.dtype != input.dtype:
            raise ValueError(
                f"all_gather {tag!r} needs an output of {group.size} x {input.numel()} elements of {input.dtype}, got "
                f"{output.numel()} of {output.dtype}"
            )
        check_overlap("all_gather", tag, output, input, group)
        self._counters.count_collective("all_gather", tag, (group.size - 1) * input.nbytes)
        return transport.all_gather(output, input, Call("all_gather", tag, input.nbytes, input.dtype))

    def reduce_scatter(
        self, output: Tensor, input: Tensor, group: Group, *, op: ReduceOp = "sum", tag: str = ""
    ) -> Work:
        transport = self._transport(group)
        output, input = self._check("reduce_scatter", tag, output, input)
        check_op("reduce_scatter", tag, op)
        if input.numel() != group.size * output.numel():
            raise ValueError(
                f"reduce_scatter {tag!r} needs an input of {group.size} x {output.numel()} elements, got "
                f"{input.numel()}"
            )
        if torch.promote_types(input.dtype, output.dtype) != output.dtype:
            raise ValueError(
                f"reduce_scatter {tag!r} reduces in the dtype of its output, which must hold {input.dtype}, got "
                f"{output.dtype}"
            )
        check_overlap("reduce_scatter", tag, input, output, group)
        received = (group.size - 1) * output.numel() * input.element_size()
        self._counters.count_collective("reduce_scatter", tag, received)
        call = Call("reduce_scatter", tag, input.nbytes, input.dtype, output.dtype, op)
        return transport.reduce_scatter(output, input, op, call)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        group: Group,
        *,
        tag: str = "",
    ) -> Work:
        transport = self._transport(group)
        output, input = self._check("all_to_all", tag, output, input)
        for what, splits, tensor in (("output", output_splits, output), ("input", input_splits, input)):
            if len(splits) != group.size or min(splits) < 0 or sum(splits) != tensor.numel():
                raise ValueError(
                    f"all_to_all {tag!r} needs {group.size} {what} splits that add up to {tensor.numel()}, got "
                    f"{list(splits)}"
                )
        if output.dtype != input.dtype or output_splits[group.rank] != input_splits[group.rank]:
            raise ValueError(
                f"all_to_all {tag!r} needs equal dtypes and the same split to this rank itself, got {input.dtype} and "
                f"{input_splits[group.rank]} in, {output.dtype} and {output_splits[group.rank]} out"
            )
        if output.numel() and input.numel() and overlap(output, input) and group.size > 1:
            raise ValueError(f"the output of all_to_all {tag!r} must not overlap its input")
        received = (output.numel() - output_splits[group.rank]) * output.element_size()
        self._counters.count_collective("all_to_all", tag, received)
        call = Call("all_to_all", tag, -1, input.dtype)  # the bytes of each rank may differ
        return transport.all_to_all(output, input, output_splits, input_splits, call)

    def all_reduce(self, tensor: Tensor, group: Group, *, op: ReduceOp = "sum", tag: str = "") -> Work:
        transport = self._transport(group)
        (tensor,) = self._check("all_reduce", tag, tensor)
        check_op("all_reduce", tag, op)
        self._counters.count_collective("all_reduce", tag, (group.size - 1) * tensor.nbytes)
        return transport.all_reduce(tensor, op, Call("all_reduce", tag, tensor.nbytes, tensor.dtype, op=op))

    def broadcast(self, tensor: Tensor, source: int, group: Group, *, tag: str = "") -> Work:
        transport = self._transport(group)
        (tensor,) = self._check("broadcast", tag, tensor)
        if not 0 <= source < group.size:
            raise ValueError(f"broadcast {tag!r} needs a source from 0 to {group.size - 1}, got {source}")
        self._counters.count_collective("broadcast", tag, 0 if source == group.rank else tensor.nbytes)
        return transport.broadcast(tensor, source, Call("broadcast", tag, tensor.nbytes, tensor.dtype, source=source))

    def barrier(self, group: Group) -> None:
        self._transport(group).barrier(Call("barrier", "", 0, torch.uint8))

    def _check(self, kind: str, tag: str, *tensors: Tensor) -> list[Tensor]:
        """The tensors as plain memory; ValueError unless they are flat and lie on the device, here the host."""
        return check_tensors(kind, tag, *tensors)

    def _transport(self, group: Group) -> Transport:
        transport = self._transports.get((group.name, group.ranks))
        if transport is not None:
            return transport
        if self._closed:
            raise ValueError(f"the collectives are closed, so group {group.name!r} cannot be used any more")
        if group.rank < 0:
            raise ValueError(f"rank {self.world.rank} is not in group {group.name!r} of ranks {list(group.ranks)}")
        raise ValueError(f"group {group.name!r} of ranks {list(group.ranks)} was not made by this accelerator")
