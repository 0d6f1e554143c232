"""One group's calls on torch.distributed, and the agreement of its ranks before them.

[Note: agreement] Device libraries compare nothing: ranks that call different things hang, or exchange garbage, and one
that waits cannot say for whom. So the ranks first tell each other on the host, over gloo, what they call; it is there
that a mismatch, a dead peer and one that does not come are found and named. With "always" this holds for every call.
With "first use" only a call that is new to the group is agreed on; later ones cost the host nothing, and what goes
wrong in them is found when the host waits for the device (see `flights`), at last by the device library's own timeout.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.accelerator.errors import CollectiveTimeout, PeerLost
from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work
from windlass.backends.cpu.arguments import overlap
from windlass.backends.cpu.gloo import GlooTransport, GlooWork
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.transport import Call, Transport, check_splits, parts
from windlass.backends.generic.flights import DEATH_SECONDS, Flights, describe_death, describe_timeout
from windlass.backends.generic.streams import DeviceLanes, OneLane

Agreement = Literal["always", "first use"]
Started = tuple[dist.Work | None, Callable[[], None]]  # what is under way, and how its result is delivered

# torch 2.13 renames these two, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessGroupTransport(Transport):
    """One group. Bytes move as bytes, so every dtype does; terms are added here wherever their order or dtype matters.

    A group of one has no process group and moves at most a copy.
    """

    def __init__(
        self,
        group: Group,
        process_group: dist.ProcessGroup | None,
        host: GlooTransport | None,  # the same ranks on the host, for agreement
        streams: DeviceLanes | OneLane,
        *,
        agreement: Agreement,
        ordered: bool,
        timeout_seconds: float,
        near: Sequence[Peer] = (),  # the other ranks on this host, whose death can be seen
    ) -> None:
        super().__init__(group)
        self.name = "alone" if process_group is None else str(dist.get_backend(process_group))
        self._process_group = process_group
        self._host = host
        self._streams = streams
        self._agreement = agreement
        self._agreed: set[tuple[int, ...]] = set()
        self._ordered = ordered
        self._timeout_seconds = timeout_seconds
        self._near = tuple(near)
        self._flights = Flights(group, near, timeout_seconds)
        self._order = [group.ranks.index(rank) for rank in sorted(group.ranks)]  # torch sorts the ranks of a group

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        self._agree(call)
        return self._run(call, output, lambda: self._gather(output, input))

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        """Terms travel in their own dtype. Whole words of equal dtype are left to the library unless the order counts;
        others are exchanged and added here, 16 bits in fp32, rounded once."""
        self._agree(call)
        wide = input.dtype == output.dtype and output.dtype.itemsize >= 4
        if wide and not self._ordered and self._is_sorted() and self.group.size > 1:
            kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
            target = torch.empty_like(output) if overlap(output, input) else output  # few libraries write into inputs

            def reduce() -> Started:
                handle = _reduce_scatter(target, input, kind, self._process_group, async_op=True)
                return handle, lambda: None if target is output else _discard(output.copy_(target))

            return self._run(call, output, reduce)
        received = torch.empty_like(input)
        equal = [output.numel()] * self.group.size

        def exchange() -> Started:
            handle, deliver = self._exchange(received, input, equal, equal)

            def add() -> None:
                deliver()
                reduce_in_order(output, parts(received, self.group), op)

            return handle, add

        return self._run(call, output, exchange)

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        if self._agree(call) and self._host is not None:
            rows = self._host.exchange(json.dumps([*input_splits, *output_splits]))
            check_splits(call, self.group, [json.loads(row) for row in rows])
        # a rank with nothing to send or receive still takes part: others may have something
        return self._run(call, None, lambda: self._exchange(output, input, output_splits, input_splits))

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        """Everybody gathers all vectors and adds them in rank order: the same bits everywhere. They are small."""
        self._agree(call)
        received = tensor.new_empty(tensor.numel() * self.group.size)

        def gather() -> Started:
            handle, deliver = self._gather(received, tensor)

            def add() -> None:
                deliver()
                reduce_in_order(tensor, parts(received, self.group), op)

            return handle, add

        return self._run(call, tensor, gather)

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        self._agree(call)
        data, sender = tensor.view(torch.uint8), self.group.ranks[source]

        def send() -> Started:
            if self.group.size == 1:
                return None, _nothing
            return dist.broadcast(data, sender, group=self._process_group, async_op=True), _nothing

        return self._run(call, tensor, send)

    def barrier(self, call: Call) -> None:
        if self._host is not None:
            self._host.barrier(call)

    def exchange(self, text: str) -> list[str]:
        return [text] if self._host is None else self._host.exchange(text)

    def look(self) -> None:
        """While the host waits for the device: raise if a collective under way will not end, or has failed."""
        if self._process_group is None:
            return
        if problem := read_problem(self._process_group):
            me, call = self.group.ranks[self.group.rank], self._flights.oldest
            where = "a collective" if call is None else str(call)
            raise PeerLost(f"a rank of group {self.group.name!r} was lost while rank {me} was in {where}: {problem}")
        self._flights.look()

    def abort(self) -> None:
        """End the collectives under way, whatever comes of them, where the library can."""
        if self._process_group is not None:
            with contextlib.suppress(RuntimeError, NotImplementedError):  # then its own timeout ends them
                self._process_group.abort()

    # ---- what the calls are made of

    def _gather(self, output: Tensor, input: Tensor) -> Started:
        if self.group.size == 1:
            return None, lambda: _discard(output.copy_(input))
        own = (input.clone() if overlap(output, input) else input).view(torch.uint8)  # as above
        whole = output.view(torch.uint8)
        if self._is_sorted():
            return _all_gather(whole, own, self._process_group, async_op=True), _nothing
        rows = parts(whole, self.group)
        ordered = [rows[index] for index in self._order]
        return dist.all_gather(ordered, own, self._process_group, async_op=True), _nothing

    def _exchange(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Started:
        """Send `input_splits[i]` elements to rank i and receive `output_splits[i]` from it."""
        if self.group.size == 1:
            return None, lambda: _discard(output.copy_(input))
        sizes = [output_splits[index] * output.element_size() for index in self._order]
        given = [input_splits[index] * input.element_size() for index in self._order]
        received, sent = output.view(torch.uint8), input.view(torch.uint8)
        if not self._is_sorted():
            pieces = torch.split(input, list(input_splits))
            sent = torch.cat([pieces[index].view(torch.uint8) for index in self._order])
            received = torch.empty_like(received)

        def deliver() -> None:
            if not self._is_sorted():
                targets = torch.split(output, list(output_splits))
                for index, part in zip(self._order, torch.split(received, sizes), strict=True):
                    targets[index].view(torch.uint8).copy_(part)

        return dist.all_to_all_single(received, sent, sizes, given, self._process_group, async_op=True), deliver

    def _is_sorted(self) -> bool:
        return self._order == sorted(self._order)

    def _run(self, call: Call, output: Tensor | None, start: Callable[[], Started]) -> Work:
        """Start something. On streams all that follows it is issued on the current lane at once, and the work is a
        point of that lane; elsewhere it is done when somebody waits."""
        if output is not None and output.numel() == 0:
            return DoneWork()
        begun = time.monotonic()
        alone = self._process_group is None

        def explain(error: RuntimeError) -> NoReturn:
            self._explain(error, call, begun)

        try:
            before = None if alone or not isinstance(self._streams, DeviceLanes) else self._streams.record()
            handle, deliver = start()
            if handle is None:
                deliver()
                return self._streams.record()
            if before is not None:
                handle.wait()
                deliver()
                after = self._streams.record()
                self._flights.add(call, before, after)
                return after
        except RuntimeError as error:
            explain(error)
        return self._streams.pending.note(GlooWork(handle, _nothing, deliver, explain))

    def _agree(self, call: Call) -> bool:
        """Whether the ranks have just told each other what they call; raises on every rank if the calls differ."""
        if self._host is None or (self._agreement == "first use" and call.words in self._agreed):
            return False
        self._host.barrier(call)
        self._agreed.add(call.words)
        return True

    def _explain(self, error: RuntimeError, call: Call, begun: float) -> NoReturn:
        """Raise what an error of the library means, with its cause."""
        me = self.group.ranks[self.group.rank]
        timed_out = time.monotonic() - begun >= 0.9 * self._timeout_seconds
        deadline = time.monotonic() + DEATH_SECONDS
        while True:
            for peer in self._near:
                if not peer.is_alive():
                    raise PeerLost(describe_death(peer, me, call)) from error
            if timed_out or not self._near or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if timed_out:
            raise CollectiveTimeout(describe_timeout(call, self._timeout_seconds, me)) from error
        raise PeerLost(
            f"a rank of group {self.group.name!r} was lost while rank {me} waited for it in {call}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def read_problem(process_group: dist.ProcessGroup) -> str:
    """What the library's own watchdog says of a group, "" while all is well or where it does not say."""
    for device in getattr(process_group, "_device_types", ()):
        read = getattr(process_group._get_backend(device), "get_error", None)
        if callable(read) and (name := getattr(read(), "name", "SUCCESS")) != "SUCCESS":
            return f"{dist.get_backend(process_group)} reports {name}"
    return ""


def reduce_in_order(output: Tensor, terms: Sequence[Tensor], op: ReduceOp) -> None:
    """output = the terms reduced in rank order in its dtype; 16 bits are added in fp32 and rounded once.

    The output may be one of the terms.
    """
    narrow = output.dtype.is_floating_point and output.dtype.itemsize < 4
    total = terms[0].to(torch.float32 if narrow else output.dtype, copy=True)
    for term in terms[1:]:
        if op == "sum":
            total.add_(term)
        else:
            torch.maximum(total, term.to(total.dtype), out=total)
    output.copy_(total)


def _discard(value: object) -> None:
    return None


def _nothing() -> None:
    return None
