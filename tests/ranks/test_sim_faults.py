"""Each simulated fault strikes where it should, and the other ranks hear of it in time."""

from __future__ import annotations

import math
from typing import Any

import pytest

import sim_fault_workers as workers
from windlass.conformance.rank_pool import RanksFailed, run_ranks


@pytest.fixture(autouse=True)
def _timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_TIMEOUT", "30")


def run(worker: Any, num_ranks: int, *args: Any, **options: Any) -> list[Any]:
    return run_ranks(worker, num_ranks, *args, accelerator="sim", **options)


def test_inf_reaches_the_sum_of_one_reduce_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "fault=inf:rank=1:at=2")
    first, second = run(workers.overflow_once, 2)
    assert first == [(0.0, True), (math.inf, True), (4.0, True)]  # the first element is in the first rank's part
    assert second == [(0.0, True), (2.0, True), (4.0, True)]


def test_exception_is_raised_where_the_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "fault=exception:rank=1:at=3")
    answers = run(workers.meet_often, 3, 5, "all_gather")
    name, text, cause, seconds = answers[1]
    assert cause == "RuntimeError"
    assert "simulated failure of rank 1 in all_gather 'weights', its collective 3" in text
    assert len(seconds) == 3
    for name, text, _, seconds in (answers[0], answers[2]):
        assert name == "PeerLost", text  # the rank that failed has left
        assert "all_gather 'weights' (call 4 of its group)" in text
        assert seconds[-1] < 10


def test_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "fault=kill:rank=1:at=2")
    with pytest.raises(RanksFailed) as caught:
        run(workers.meet_often, 3, 5, "all_reduce", fresh=True, grace=10)
    assert "exit code -9" in caught.value.failures[1]
    assert sorted(caught.value.results) == [0, 2]
    texts = []
    for name, text, _, seconds in caught.value.results.values():
        assert name == "PeerLost", text
        assert len(seconds) == 2
        assert seconds[-1] < 10
        texts.append(text)
    assert any("rank 1 (pid" in text and "all_reduce 'norm' (call 3 of its group)" in text for text in texts)


def test_slow_rank_stays_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "fault=slow:rank=0:at=3:seconds=0.4")
    for name, text, _, seconds in run(workers.meet_often, 2, 5, "all_reduce"):
        assert name == "nothing", text
        assert max(seconds[:2]) < 0.35
        assert all(0.35 < one < 1.5 for one in seconds[2:])


def test_dropped_call_is_a_timeout_that_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "fault=drop:rank=2:at=2")
    monkeypatch.setenv("WINDLASS_TIMEOUT", "4")
    answers = run(workers.meet_often, 3, 5, "all_gather")
    for name, text, _, seconds in answers[:2]:
        assert name == "CollectiveTimeout", text
        assert "rank 2 did not arrive in all_gather 'weights' (call 3 of its group) within 4 s" in text
        assert 3.6 < seconds[-1] < 6
    name, text, _, seconds = answers[2]
    assert name == "CollectiveTimeout"
    assert "rank 2 never entered all_gather 'weights', its collective 2, as the simulated fault 'drop' wants it" in text
    assert seconds[-1] < 8


def test_fault_of_another_rank_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "fault=kill:rank=7:at=1")
    for name, text, _, _ in run(workers.meet_often, 2, 3, "all_reduce"):
        assert name == "nothing", text
