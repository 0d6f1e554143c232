"""Collectives over gloo: for ranks on several hosts, and the transport that the shared pages are checked against.

gloo itself neither compares calls nor says who is missing, so the ranks first tell each other what they
call, one message per pair; a rank whose message does not come is the one to name.

[Note: connections] Peers learn that this rank has left from its connections, which end with the last reference to the
process group. Works that are under way are such references, and an error keeps what its frames hold: so they are let go
before an error is raised, and the group itself when the transport is closed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.accelerator.errors import CollectiveMismatch, CollectiveTimeout, PeerLost
from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.reductions import reduce_in_order
from windlass.backends.cpu.transport import Call, Transport, check_splits, describe, describe_mismatch, parts

_TAG_WORDS = 8
_CALL_WORDS = 6
_DEATH_SECONDS = 0.5  # a connection breaks a little before the process that held it is gone

Started = tuple[dist.Work | None, Callable[[], None]]  # what gloo carries out, and how its result is delivered


class GlooWork(Work):
    """A collective that gloo carries out on its own threads, and what remains to be done after it."""

    def __init__(
        self,
        handle: dist.Work,
        before_waiting: Callable[[], None],
        complete: Callable[[], None],
        explain: Callable[[RuntimeError], NoReturn],
    ) -> None:
        self._handle: dist.Work | None = handle
        self._before_waiting = before_waiting
        self._complete = complete
        self._explain = explain

    def wait(self) -> None:
        if self._handle is None:
            return
        if not self._handle.is_completed():
            self._before_waiting()
        try:
            self._handle.wait()
        except RuntimeError as error:
            self._handle = None
            self._explain(error)
        self._handle = None
        complete, self._complete = self._complete, _nothing
        complete()
        # They reach the process group, whose threads must be able to end before the interpreter does.
        self._before_waiting, self._explain = _nothing, _raise_again

    def done(self) -> bool:
        if self._handle is not None and self._handle.is_completed():
            self.wait()
        return self._handle is None


class GlooTransport(Transport):
    """One group on a gloo process group."""

    name = "gloo"

    def __init__(
        self,
        group: Group,
        process_group: dist.ProcessGroup,
        timeout_seconds: float,
        near: Sequence[Peer] = (),  # the other ranks on this host: their death can be told from a broken link
        before_waiting: Callable[[], None] = lambda: None,  # see the note in `board`
    ) -> None:
        super().__init__(group)
        self._process_group: dist.ProcessGroup | None = process_group  # None once it is closed
        self._timeout_seconds = timeout_seconds
        self._near = tuple(near)
        self._before_waiting = before_waiting
        self._started: weakref.WeakSet[GlooWork] = weakref.WeakSet()
        self._me = group.ranks[group.rank]
        self._order = [group.ranks.index(rank) for rank in sorted(group.ranks)]  # torch sorts the ranks of a group
        self._sorted = self._order == sorted(self._order)

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        self._agree(call)
        if not input.numel():
            return DoneWork()
        source = parts(output, self.group)[self.group.rank]
        source = input.clone() if source.data_ptr() == input.data_ptr() else input
        return self._start(
            call,
            lambda: self._gather(output, source),
        )

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        self._agree(call)
        if not output.numel():
            return DoneWork()
        received = torch.empty_like(input)
        equal = [output.numel()] * self.group.size
        return self._start(
            call,
            lambda: self._exchange(received, input, equal, equal),
            lambda: reduce_in_order(output, parts(received, self.group), op),
        )

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        splits = self._agree(call, [*input_splits, *output_splits])
        check_splits(call, self.group, splits)
        if not any(map(any, splits)):
            return DoneWork()
        return self._start(call, lambda: self._exchange(output, input, output_splits, input_splits))

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        self._agree(call)
        if not tensor.numel():
            return DoneWork()
        received = tensor.new_empty(tensor.numel() * self.group.size)
        source = tensor.clone()
        return self._start(
            call,
            lambda: self._gather(received, source),
            lambda: reduce_in_order(tensor, parts(received, self.group), op),
        )

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        self._agree(call)
        if not tensor.numel():
            return DoneWork()
        sender = self.group.ranks[source]
        data = tensor.view(torch.uint8)
        return self._start(
            call, lambda: (dist.broadcast(data, sender, group=self._process_group, async_op=True), lambda: None)
        )

    def finish(self) -> None:
        for work in list(self._started):
            work.wait()

    def barrier(self, call: Call) -> None:
        self._agree(call)

    def close(self) -> None:
        self._process_group = None

    def _gather(self, output: Tensor, input: Tensor) -> Started:
        rows = parts(output.view(torch.uint8), self.group)
        rows = [rows[index] for index in self._order]
        return dist.all_gather(rows, input.view(torch.uint8), group=self._process_group, async_op=True), lambda: None

    def _exchange(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Started:
        """Send `input_splits[i]` elements to rank i and receive `output_splits[i]` from it."""
        sizes = [output_splits[index] * output.element_size() for index in self._order]
        given = [input_splits[index] * input.element_size() for index in self._order]
        received, sent = output.view(torch.uint8), input.view(torch.uint8)
        if not self._sorted:
            pieces = torch.split(input, list(input_splits))
            sent = torch.cat([pieces[index].view(torch.uint8) for index in self._order])
            received = torch.empty_like(received)
        handle = dist.all_to_all_single(received, sent, sizes, given, group=self._process_group, async_op=True)

        def deliver() -> None:
            if not self._sorted:
                targets = torch.split(output, list(output_splits))
                for index, part in zip(self._order, torch.split(received, sizes), strict=True):
                    targets[index].view(torch.uint8).copy_(part)

        return handle, deliver

    def _start(self, call: Call, start: Callable[[], Started], finish: Callable[[], None] = lambda: None) -> Work:
        """Start something asynchronous; `finish` is what remains to be done with its result."""
        begun = time.monotonic()

        def explain(error: RuntimeError) -> NoReturn:
            self._explain(error, call, None, begun)

        try:
            handle, deliver = start()
        except RuntimeError as error:
            explain(error)
        assert handle is not None

        def complete() -> None:
            deliver()
            finish()

        work = GlooWork(handle, self._before_waiting, complete, explain)
        self._started.add(work)
        return work

    def _agree(self, call: Call, splits: Sequence[int] = ()) -> list[list[int]]:
        """Meet in a call: return everybody's `splits`, or raise on every rank if the calls differ."""
        tag = call.tag.encode()[: 8 * _TAG_WORDS].ljust(8 * _TAG_WORDS, b"\0")
        tag_words = [int.from_bytes(tag[at : at + 8], "little", signed=True) for at in range(0, len(tag), 8)]
        self._before_waiting()
        padded = [*splits, *[0] * (2 * self.group.size - len(splits))]
        mine = torch.tensor([*call.words, *tag_words, *padded], dtype=torch.int64, device="cpu")
        table = mine.repeat(self.group.size, 1)
        others = [index for index in range(self.group.size) if index != self.group.rank]
        begun = time.monotonic()
        deadline = begun + self._timeout_seconds
        index = None
        works: list[dist.Work | None] = []
        try:
            works += [dist.irecv(table[at], self.group.ranks[at], self._process_group) for at in others]
            works += [dist.isend(mine, self.group.ranks[at], self._process_group) for at in others]
            for place in range(len(works)):
                index = others[place % len(others)]
                _wait_for(works[place], deadline)
        except RuntimeError as error:
            works.clear()
            self._explain(error, call, index, begun)
        rows: list[list[int]] = table.tolist()
        for at, row in enumerate(rows):
            if row[:_CALL_WORDS] != rows[0][:_CALL_WORDS]:
                raise CollectiveMismatch(
                    describe_mismatch(self.group.ranks[0], _describe(rows[0]), self.group.ranks[at], _describe(row))
                )
        return [row[_CALL_WORDS + _TAG_WORDS :] for row in rows]

    def _explain(self, error: RuntimeError, call: Call, index: int | None, begun: float) -> NoReturn:
        """Raise what an error of gloo means. `index` is the rank whose message was waited for, if known."""
        error.__traceback__ = None  # frames of torch hold the group
        timed_out = time.monotonic() - begun >= 0.9 * self._timeout_seconds
        looked = time.monotonic()
        while True:
            for peer in self._near:
                if not peer.is_alive():
                    raise PeerLost(
                        f"rank {peer.rank} (pid {peer.pid}) died while rank {self._me} waited for it in {call}"
                    ) from error
            if timed_out or not self._near or time.monotonic() - looked > _DEATH_SECONDS:
                break
            time.sleep(0.02)
        who = "a rank" if index is None else f"rank {self.group.ranks[index]}"
        if timed_out:
            raise CollectiveTimeout(
                f"{who} did not arrive in {call} within {self._timeout_seconds:g} s while rank {self._me} waited; see "
                "what keeps it, or set WINDLASS_TIMEOUT to more seconds"
            ) from error
        raise PeerLost(
            f"{who} of group {self.group.name!r} was lost while rank {self._me} waited for it in {call}: "
            f"{_shorten(error)}"
        ) from error


def _wait_for(work: dist.Work | None, deadline: float) -> None:
    assert work is not None
    remaining = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
    try:
        work.wait(remaining)
    finally:
        work = None  # an error would keep it


def _describe(row: Sequence[int]) -> str:
    words = row[_CALL_WORDS : _CALL_WORDS + _TAG_WORDS]
    tag = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
    return describe(row[:_CALL_WORDS], tag.rstrip(b"\0").decode(errors="replace"))


def _shorten(error: RuntimeError) -> str:
    """The first sentence of an error of gloo, without the file it comes from."""
    text = str(error).splitlines()[0]
    return (text.partition("] ")[2] if text.startswith("[/") else text).partition(". ")[0]


def _nothing() -> None:
    return None


def _raise_again(error: RuntimeError) -> NoReturn:
    raise error
