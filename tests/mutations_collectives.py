"""Mutations of the CPU's collectives: on shared pages where ranks meet, and of the facet above them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mutations import Afterwards, mutation
from windlass.accelerator.counters import Counters
from windlass.accelerator.interface import Group, Work
from windlass.backends.cpu import shared_transport
from windlass.backends.cpu.collectives import CpuCollectives
from windlass.backends.cpu.control_page import ControlPage
from windlass.backends.cpu.meetings import MeetingWork
from windlass.backends.cpu.shared_transport import SharedTransport

_REDUCE = "test_l2_collectives.py::test_reduce_scatter"

# ---- reductions


@mutation("cpu", shared_transport, "reduce_in_order", "a sum is the mean", f"{_REDUCE}[2-float32-float32]")
def sum_is_mean(reduce: Any, output: Tensor, terms: list[Tensor], op: str) -> None:
    reduce(output, terms, op)
    if op == "sum":
        output.div_(len(terms))


@mutation(
    "cpu", shared_transport, "reduce_in_order", "the last rank is left out of a sum", f"{_REDUCE}[2-float32-float32]"
)
def sum_misses_a_rank(reduce: Any, output: Tensor, terms: list[Tensor], op: str) -> None:
    reduce(output, terms[:-1], op)


@mutation(
    "cpu",
    shared_transport,
    "reduce_in_order",
    "sums are added in the dtype of the input",
    f"{_REDUCE}[2-bfloat16-float32]",
)
def sum_in_input_dtype(reduce: Any, output: Tensor, terms: list[Tensor], op: str) -> None:
    narrow = torch.empty_like(terms[0])
    reduce(narrow, terms, op)
    output.copy_(narrow)


@mutation(
    "cpu",
    shared_transport,
    "reduce_in_order",
    "sums are added in reverse rank order",
    "test_l2_collectives.py::test_ordered_reduction[3-float32]",
)
def sum_in_reverse_order(reduce: Any, output: Tensor, terms: list[Tensor], op: str) -> None:
    reduce(output, terms[::-1], op)


@mutation("cpu", shared_transport, "reduce_in_order", "a maximum starts from 0", f"{_REDUCE}[2-float32-float32]")
def maximum_from_zero(reduce: Any, output: Tensor, terms: list[Tensor], op: str) -> None:
    reduce(output, terms, op)
    if op == "max":
        output.clamp_(min=0)


# ---- what moves


@mutation(
    "cpu",
    SharedTransport,
    "all_gather",
    "an all-gather is rotated by one rank",
    "test_l2_collectives.py::test_all_gather[2-float32]",
)
def gather_rotated(all_gather: Any, self: SharedTransport, output: Tensor, input: Tensor, call: Any) -> Work:
    work = all_gather(self, output, input, call)
    return Afterwards(work, lambda: output.copy_(output.roll(input.numel())))


@mutation(
    "cpu",
    SharedTransport,
    "all_to_all",
    "the pieces of an all-to-all arrive in reverse order",
    "test_l2_collectives.py::test_all_to_all[2-float32]",
)
def exchange_in_reverse_order(
    all_to_all: Any, self: Any, output: Tensor, input: Tensor, splits: Any, *args: Any
) -> Work:
    work = all_to_all(self, output, input, splits, *args)
    return Afterwards(work, lambda: output.copy_(torch.cat(output.split(list(splits))[::-1])))


@mutation(
    "cpu",
    CpuCollectives,
    "broadcast",
    "a broadcast always comes from rank 0",
    "test_l2_collectives.py::test_broadcast[2-float32]",
)
def broadcast_from_first(broadcast: Any, self: Any, tensor: Tensor, source: int, *args: Any, **options: Any) -> Any:
    return broadcast(self, tensor, 0, *args, **options)


@mutation(
    "cpu",
    CpuCollectives,
    "fetch",
    "a fetch brings the first shard for all",
    "test_l2_groups.py::test_fetch[2-float32]",
)
def fetch_repeats_first(fetch: Any, self: Any, output: Tensor, shard: Tensor, group: Group, *, tag: str = "") -> Work:
    work = fetch(self, output, shard, group, tag=tag)
    return Afterwards(work, lambda: output.copy_(output[: shard.numel()].repeat(group.size)))


# ---- works and meetings


@mutation("cpu", MeetingWork, "wait", "wait() moves nothing", "test_l2_collectives.py::test_all_gather[2-float32]")
def wait_moves_nothing(wait: Any, *args: Any) -> None:
    return None


@mutation("cpu", MeetingWork, "done", "done() is always True", "test_l2_order.py::test_done_of_a_collective")
def done_is_always_true(done: Any, *args: Any) -> bool:
    return True


@mutation("cpu", CpuCollectives, "barrier", "a barrier does not wait", "test_l2_groups.py::test_barrier[2]")
def barrier_does_not_wait(barrier: Any, *args: Any) -> None:
    return None


@mutation("cpu", ControlPage, "write", "tags are not compared", "test_l2_refusals.py::test_mismatch[tag]")
def tags_not_compared(write: Any, self: Any, number: int, words: Any, tag: str, *args: Any) -> None:
    write(self, number, (words[0], 0, *words[2:]), "", *args)


@mutation(
    "cpu",
    CpuCollectives,
    "publish",
    "publish() does not wait for the others",
    "test_l2_more_publish.py::test_late_publication[2]",
)
def publish_does_not_wait(publish: Any, *args: Any) -> None:
    return None


@mutation(
    "cpu",
    shared_transport,
    "check_splits",
    "the splits of an all-to-all are not compared",
    "test_l2_refusals.py::test_mismatch[splits]",
)
def splits_not_compared(check: Any, *args: Any) -> None:
    return None


@mutation("cpu", CpuCollectives, "group", "a group is always the world", "test_l2_groups.py::test_group_facts[2]")
def group_ignores_ranks(group: Any, self: CpuCollectives, *args: Any) -> Group:
    return self.world


@mutation(
    "cpu",
    CpuCollectives,
    "all_gather",
    "an all-gather goes by the ranks in the world, not by the places in the group",
    "test_l2_groups.py::test_parts_of_the_world[2]",
)
def gather_by_rank_in_world(
    all_gather: Any, self: Any, output: Tensor, input: Tensor, group: Group, *, tag: str = ""
) -> Work:
    work = all_gather(self, output, input, group, tag=tag)
    places = sorted(range(group.size), key=lambda place: group.ranks[place])
    return Afterwards(work, lambda: output.copy_(output.view(group.size, -1)[places].flatten()))


# ---- counters


@mutation(
    "cpu", CpuCollectives, "all_gather", "an all-gather is not counted", "test_l2_groups.py::test_counters[2-float32]"
)
def gather_not_counted(all_gather: Any, self: CpuCollectives, *args: Any, **options: Any) -> Any:
    kept, self._counters = self._counters, Counters()
    try:
        return all_gather(self, *args, **options)
    finally:
        self._counters = kept


@mutation(
    "cpu",
    Counters,
    "count_collective",
    "the bytes of collectives are counted twice",
    "test_l2_groups.py::test_counters[2-float32]",
)
def bytes_counted_twice(count: Any, self: Counters, kind: str, tag: str, received: int) -> None:
    count(self, kind, tag, 2 * received)
