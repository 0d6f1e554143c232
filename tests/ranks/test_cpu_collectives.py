"""The CPU's collectives on real processes, over every transport, against plain tensor arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cpu_collective_workers as workers
from windlass.conformance.rank_pool import RanksFailed, run_ranks

BOTH = pytest.mark.parametrize("transport", ["memory file", "gloo"])
EVERY = pytest.mark.parametrize("transport", ["memory file", "unlinked file", "gloo"])


def survivors(failed: RanksFailed) -> dict[int, Any]:
    return dict(failed.results)


def list_shared_files() -> list[str]:
    """What windlass has in /dev/shm; other programs come and go there."""
    return sorted(path.name for path in Path("/dev/shm").glob("windlass-*"))


@EVERY
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_gather_equals_concatenation(transport: str, num_ranks: int) -> None:
    names = run_ranks(workers.check_all_gather, num_ranks, transport)
    wanted = "alone" if num_ranks == 1 else "gloo" if transport == "gloo" else "shared pages"
    assert names == [wanted] * num_ranks


@BOTH
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_reduce_scatter_adds_in_rank_order_to_the_bit(transport: str, num_ranks: int) -> None:
    run_ranks(workers.check_reduce_scatter, num_ranks, transport)


@EVERY
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_reductions_broadcasts_and_uneven_exchanges(transport: str, num_ranks: int) -> None:
    run_ranks(workers.check_others, num_ranks, transport)


@BOTH
def test_groups_of_some_ranks(transport: str) -> None:
    for rank, texts in enumerate(run_ranks(workers.check_groups, 3, transport)):
        outside, twice = texts
        assert outside == f"rank {rank} is not in group 'alone' of ranks [{(rank - 1) % 3}]"
        assert "different ranks from 0 to 2, got [0, 0]" in twice


@BOTH
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_counters_hold_bytes_received_from_others(transport: str, num_ranks: int) -> None:
    for rank, counters in enumerate(run_ranks(workers.count_calls, num_ranks, transport)):
        others = num_ranks - 1
        assert {key: value for key, value in counters.items() if key != "host"} == {
            "collective/all_gather/weights": {"calls": 4, "bytes": 4 * others * 11 * 4},
            "collective/reduce_scatter/gradients": {"calls": 1, "bytes": others * 11 * 2},
            "collective/all_reduce/norm": {"calls": 1, "bytes": others * 11 * 4},
            "collective/broadcast/start": {"calls": 1, "bytes": 0 if rank == others else 11 * 4},
            "collective/all_to_all/tokens": {"calls": 1, "bytes": others * 3 * 4},
        }


@BOTH
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_wait_in_other_orders_do_not_deadlock(transport: str, num_ranks: int) -> None:
    run_ranks(workers.wait_in_other_orders, num_ranks, transport, 100, timeout=60)


def test_waiting_on_one_transport_does_not_hold_up_the_other() -> None:
    assert run_ranks(workers.wait_on_two_transports, 2, 12, timeout=30) == ["gloo, shared pages"] * 2


@BOTH
def test_input_may_be_rewritten_after_wait(transport: str) -> None:
    run_ranks(workers.rewrite_inputs, 2, transport, 30 if transport == "gloo" else 300)


@BOTH
@pytest.mark.parametrize(
    ("difference", "one", "other"),
    [
        ("kind", "reduce_scatter 'gradients' of 48 bytes of float32", "all_gather 'gradients' of 16 bytes of float32"),
        ("tag", "reduce_scatter 'gradients'", "reduce_scatter 'other'"),
        ("bytes", "'gradients' of 48 bytes", "'gradients' of 60 bytes"),
        ("dtype", "48 bytes of float32", "48 bytes of int32"),
        ("barrier", "reduce_scatter 'gradients'", "rank 1 called barrier"),
        ("splits", "rank 1 sends 2 elements to rank 0", "which expects 1"),
    ],
)
def test_different_calls_raise_on_every_rank(transport: str, difference: str, one: str, other: str) -> None:
    for name, text, seconds in run_ranks(workers.make_different_calls, 3, transport, difference):
        assert name == "CollectiveMismatch"
        assert one in text
        assert other in text
        assert seconds < 5


@BOTH
def test_dead_rank_is_named_within_seconds(transport: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(workers.lose_rank, 3, transport, "dies", fresh=True, grace=10)
    answers = survivors(caught.value)
    assert sorted(answers) == [0, 2]
    for name, _, seconds, _ in answers.values():
        assert name == "PeerLost"
        assert seconds < 5
    first = answers[0][1] + answers[2][1]
    assert "rank 1 (pid" in first
    assert "'weights'" in first


@pytest.mark.parametrize("transport", ["memory file", "unlinked file"])
def test_dead_rank_leaves_no_file(transport: str) -> None:
    before = list_shared_files()
    with pytest.raises(RanksFailed):
        run_ranks(workers.lose_rank, 2, transport, "dies", fresh=True)
    assert list_shared_files() == before


def test_rank_that_left_is_named() -> None:
    answers = run_ranks(workers.lose_rank, 2, "memory file", "leaves")
    assert answers[0][:2] == ("PeerLost", "rank 1 left while rank 0 waited for it in all_gather 'weights'")


@BOTH
def test_late_rank_is_named_after_the_timeout(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_TIMEOUT", "1")
    answers = run_ranks(workers.lose_rank, 2, transport, "late")
    name, text, seconds, _ = answers[0]
    assert name == "CollectiveTimeout"
    assert text.startswith("rank 1 did not arrive in all_gather 'weights' within 1 s while rank 0 waited")
    assert 0.9 < seconds < 2.5
    assert answers[1][0] == "PeerLost"


@pytest.mark.parametrize("missing", [0, 1])
def test_rank_that_never_comes_is_a_timeout(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_TIMEOUT", "2")
    name, text, seconds = run_ranks(workers.come_alone, 2, missing)[1 - missing]
    assert name == "CollectiveTimeout"
    assert text.startswith("not all of the 2 ranks that are expected came to 127.0.0.1:")
    assert "within 2 s" in text
    assert seconds < 10


@BOTH
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_fetch_needs_no_partner_on_shared_pages(transport: str, num_ranks: int) -> None:
    fetched = run_ranks(workers.fetch_unequally, num_ranks, transport)
    one_sided = num_ranks > 1 and transport == "memory file"
    assert fetched == [8 * (rank + 1) if one_sided else 8 for rank in range(num_ranks)]


@pytest.mark.parametrize("transport", ["memory file", "unlinked file"])
def test_release_unmaps_and_close_leaves_nothing(transport: str) -> None:
    before = list_shared_files()
    for counts in run_ranks(workers.look_for_remains, 2, transport, fresh=True):
        assert counts["allocated"] == counts["before"] + 2
        assert counts["used"] == 4 << 20
        assert (
            counts["released"] == counts["viewed"] - 1
        )  # the peer's mapping went with release, ours with its last view
        assert counts["used after"] == 0
        assert counts["left"] == 0
        assert counts["initialized"] == 0
    assert list_shared_files() == before


def test_rank_without_room_for_its_part_tells_the_others() -> None:
    (first, first_used), (second, second_used) = run_ranks(workers.run_out_of_memory, 2, "memory file")
    assert first.startswith("cpu:0 cannot hold 3.9 KiB for 'weights'")
    assert first.endswith("(rank 1 has no room for its part of the allocation)")
    assert "1000 B free of a budget of 1000 B" in second
    assert first_used == second_used == 400


def test_device_can_be_opened_again() -> None:
    assert run_ranks(workers.open_repeatedly, 2, 3) == [[1.0, 3.0, 5.0]] * 2


@BOTH
def test_process_group_of_the_user_is_used_and_kept(transport: str) -> None:
    assert run_ranks(workers.use_the_process_group_of_the_user, 2, transport) == [(4.0, True)] * 2


@pytest.mark.parametrize(
    ("refused", "wanted"), [(["/proc/"], "shared pages"), (["/proc/", "/dev/shm/", "/tmp/"], "gloo")]
)
def test_all_ranks_take_another_way_when_one_is_refused(refused: list[str], wanted: str) -> None:
    before = list_shared_files()
    assert run_ranks(workers.refuse_doors, 2, refused, 1) == [(wanted, 2.0)] * 2
    assert list_shared_files() == before
