"""Groups that meet in one instruction, and ranks that agree on what they call before it is in a program."""

from __future__ import annotations

import pytest

import in_graph_workers as workers
from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Group
from windlass.backends.xla.in_graph import Partition, Partitions
from windlass.conformance.rank_pool import run_ranks


def _groups(partition: Partition) -> list[list[int]]:
    return partition.replica_groups(Group("any", partition.groups[0], 0))


def test_the_groups_of_an_axis_become_one_partition() -> None:
    partitions = Partitions(range(8))
    world = partitions.join(range(8))
    rows = [partitions.join(ranks) for ranks in ((0, 1, 2, 3), (4, 5, 6, 7))]
    columns = [partitions.join((first, first + 4)) for first in range(4)]
    assert _groups(world) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert rows[0] is rows[1]
    assert _groups(rows[0]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(set(map(id, columns))) == 1
    assert _groups(columns[0]) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_group_keeps_its_order_and_meets_again_under_another_name() -> None:
    partitions = Partitions(range(4))
    first = partitions.join((3, 1))
    partitions.join((0, 2))
    partitions.join((0, 1, 2, 3))
    assert partitions.join((3, 1)) is first
    assert _groups(first) == [[3, 1], [0, 2]]


def test_ranks_are_written_in_the_numbers_of_xla() -> None:
    partition = Partitions((2, 0, 3, 1)).join((0, 1))
    partition.groups.append((3, 2))
    assert _groups(partition) == [[2, 0], [1, 3]]


@pytest.mark.parametrize("between", [(1, 2), (0, 1, 2, 3)])
def test_a_partition_ends_where_a_group_does_not_fit(between: tuple[int, ...]) -> None:
    partitions = Partitions(range(4))
    begun = partitions.join((0, 1))
    assert partitions.join(between) is not begun
    assert partitions.join((2, 3)) is not begun
    with pytest.raises(Unsupported) as caught:
        begun.replica_groups(Group("front", (0, 1), 0))
    assert str(caught.value) == (
        "group 'front' of ranks [0, 1] cannot meet inside an XLA program, which all ranks run: no group of the same "
        "size, made right after it, has ranks [2, 3]; make the groups of an axis one after the other, until every rank "
        "is in one"
    )


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            "size",
            "rank 0 called all_reduce 'norm' of 16 bytes of float32, rank 1 called all_reduce 'norm' of 20 bytes of "
            "float32: all ranks of a group must make the same calls",
        ),
        (
            "kind",
            "rank 0 called all_reduce 'norm' of 16 bytes of float32, rank 1 called broadcast 'norm' of 16 bytes of "
            "float32 from index 0: all ranks of a group must make the same calls",
        ),
        (
            "splits",
            "rank 1 sends 1 elements to rank 0 in all_to_all 'x', which expects 2: the splits of all ranks must fit "
            "together",
        ),
    ],
)
def test_calls_that_differ_raise_on_every_rank(what: str, sentence: str) -> None:
    assert run_ranks(workers.differ, 2, what) == [("CollectiveMismatch", sentence)] * 2


def test_replicas_that_are_not_the_ranks_are_refused() -> None:
    for kind, text in run_ranks(workers.find_ordinals, 2):
        assert kind == "BackendUnusable"
        assert text.startswith("the 2 ranks of this job are replicas [0, 0] of an XLA program of 1: start one process ")
