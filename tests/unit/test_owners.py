"""Who works on what: against every possible deal of small cases, and by what the bounds of the heuristics say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from windlass.core.owners import Piece, assign_owners, find_pieces, pack_shards


def least_load(costs: Sequence[int], loads: Sequence[int]) -> int:
    """Of the busiest rank, in the best of all deals."""
    best = sum(costs) + max(loads)
    for owners in itertools.product(range(len(loads)), repeat=len(costs)):
        after = list(loads)
        for owner, cost in zip(owners, costs, strict=True):
            after[owner] += cost
        best = min(best, max(after))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_owners_are_within_a_third_of_the_best_deal(seed: int) -> None:
    chance = random.Random(seed)
    ranks = chance.choice((2, 3))
    costs = [chance.choice((1, 2, 5, 7, 11, 12)) for _ in range(chance.randint(1, 7))]
    owners, after = assign_owners(costs, [()] * len(costs), [0] * ranks)
    summed = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert after == summed
    assert 3 * max(after) <= 4 * least_load(costs, [0] * ranks)


@pytest.mark.parametrize("seed", range(6))
def test_work_that_ranks_have_already_counts(seed: int) -> None:
    chance = random.Random(100 + seed)
    costs, loads = [chance.randint(1, 9) for _ in range(6)], [chance.randint(0, 15) for _ in range(3)]
    owners, after = assign_owners(costs, [()] * 6, loads)
    for rank in range(3):
        own = sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        assert after[rank] == loads[rank] + own
    assert 3 * max(after) <= 4 * least_load(costs, loads)


def test_packing_finds_what_longest_first_does_not() -> None:
    """Two ranks, 3 3 2 2 2: longest first ends at 7, the best deal at 6."""
    assert max(assign_owners([3, 3, 2, 2, 2], [()] * 5, [0, 0])[1]) == 6
    qwen = [70] * 84 + [50] * 56 + [30] * 56  # the work on Qwen3-0.6B's matrices, on 64 ranks
    assert max(assign_owners(qwen, [()] * len(qwen), [0] * 64)[1]) == 170  # with longest first it is 180


def test_a_rank_that_holds_a_matrix_is_preferred_if_that_costs_nothing() -> None:
    pieces = [(Piece(2, 0, 8), Piece(3, 8, 10)), (Piece(0, 10, 13), Piece(1, 13, 20)), (), (Piece(1, 20, 30),)]
    assert assign_owners([4, 4, 4, 4], pieces, [0] * 4)[0] == [2, 1, 0, 3]  # 1 has its matrix when the last is dealt
    assert assign_owners([4, 4], [pieces[0]] * 2, [0, 0, 9, 0])[0] == [3, 0]  # 2 is busy, and 3 holds some


def test_owners_do_not_depend_on_chance() -> None:
    costs = [5, 5, 5, 3, 3, 1] * 20
    found = [assign_owners(list(costs), [()] * len(costs), [0] * 7) for _ in range(2)]
    assert found[0] == found[1]
    assert assign_owners([2] * 5, [()] * 5, [0] * 3)[0] == [0, 1, 2, 0, 1]  # equals in order, to the first rank


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_hold_every_item_once_and_are_near_the_best(shards: int) -> None:
    sizes = [640, 64, 128, 640, 320, 64, 192]
    packed = pack_shards(sizes, shards)
    assert sorted(itertools.chain(*packed)) == list(range(7))
    assert 3 * max(sum(sizes[item] for item in shard) for shard in packed) <= 4 * least_load(sizes, [0] * shards)


def test_pieces_are_the_elements_of_each_shard() -> None:
    for start, stop, shard in itertools.product((0, 3, 8, 17), (17, 18, 24, 40), (1, 8, 50)):
        found = find_pieces(start, stop, shard)
        elements = [(piece.rank, element) for piece in found for element in range(piece.start, piece.stop)]
        assert elements == [(element // shard, element) for element in range(start, stop)]
        assert len({piece.rank for piece in found}) == len(found)
