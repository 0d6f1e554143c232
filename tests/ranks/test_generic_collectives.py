"""Collectives of the generic base over torch.distributed: right in every dtype, agreed on, and never silent."""

from __future__ import annotations

import pytest

import generic_workers as workers
from windlass.conformance.rank_pool import RanksFailed, run_ranks


@pytest.mark.parametrize(("agreement", "ordered"), [("always", False), ("first use", True)])
def test_every_collective_in_every_dtype(agreement: str, ordered: bool) -> None:
    results = run_ranks(workers.carry_everything, 3, agreement, ordered)
    # received from others, of 5 fp32 per rank: twice on the world, and on ranks 0 and 2 twice on their pair
    gathered = [2 * (2 * 5 + 5) * 4, 2 * 2 * 5 * 4, 2 * (2 * 5 + 5) * 4]
    assert [result["all_gather"] for result in results] == gathered
    assert [result["reduce_scatter"] for result in results] == [2 * count for count in gathered]  # sum and max


@pytest.mark.parametrize("agreement", ["always", "first use"])
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
            "rank 0 called broadcast 'norm' of 16 bytes of float32 from index 0, rank 1 called all_reduce 'norm' of 16 "
            "bytes of float32: all ranks of a group must make the same calls",
        ),
        (
            "splits",
            "rank 1 sends 1 elements to rank 0 in all_to_all 'x', which expects 2: the splits of all ranks must fit "
            "together",
        ),
    ],
)
def test_calls_that_differ_raise_on_every_rank(agreement: str, what: str, sentence: str) -> None:
    assert run_ranks(workers.differ, 3, agreement, what) == [("CollectiveMismatch", sentence)] * 3


@pytest.mark.slow
def test_a_peer_that_dies_is_named() -> None:
    """In a call that was agreed on before, so that the library beneath finds it. The agreement itself is tested with
    the transport that carries it."""
    with pytest.raises(RanksFailed) as caught:
        run_ranks(workers.lose_a_peer, 3, "first use", fresh=True, grace=20)
    assert list(caught.value.failures) == [1]
    assert "exit code 3" in caught.value.failures[1]
    assert set(caught.value.results) == {0, 2}
    for rank, (kind, text) in caught.value.results.items():
        assert kind == "PeerLost"
        assert text.startswith("rank 1 (pid ")
        assert text.endswith(f") died while rank {rank} waited for it in all_reduce 'norm'")


@pytest.mark.parametrize("stage", [2, 3])
def test_no_thread_outlives_the_groups(stage: int) -> None:
    """One that meets the end of the interpreter ends it by SIGABRT, now and then. In processes of their own: those of
    the pool hold what failures in other tests left."""
    (before, after), _ = run_ranks(workers.train_and_count_threads, 2, stage, fresh=True)
    assert before > 1
    assert after == 0


def test_work_on_streams_is_a_point_of_the_lane() -> None:
    run_ranks(workers.gather_on_a_lane, 2)


def test_tensors_of_the_host_beside_a_device() -> None:
    """On a device whose bytes no library reaches, so that what arrives has gone over the host."""
    results = run_ranks(workers.carry_host_tensors, 3, fresh=True)
    gathered = [(2 * 5 + 5) * 4, 2 * 5 * 4, (2 * 5 + 5) * 4]
    assert [result["all_gather"] for result in results] == gathered


def test_a_collective_that_fails_while_the_host_waits_for_the_device_is_the_last() -> None:
    run_ranks(workers.wait_for_a_late_rank, 2)
