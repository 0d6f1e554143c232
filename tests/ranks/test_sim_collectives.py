"""The simulated accelerator's collectives on real processes, against plain tensor arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

import sim_workers as workers
from windlass.backends.sim.machines import load_machine
from windlass.conformance.rank_pool import run_ranks


def run(worker: Any, num_ranks: int, *args: Any, **options: Any) -> list[Any]:
    return run_ranks(worker, num_ranks, *args, accelerator="sim", **options)


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "delay_ms=0.1")
    monkeypatch.setenv("WINDLASS_TIMEOUT", "30")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_values_are_those_of_plain_arithmetic(num_ranks: int) -> None:
    run(workers.check_values, num_ranks)


@pytest.mark.parametrize(("num_ranks", "delay"), [(2, 0.0), (4, 0.5)])
def test_hundreds_of_calls_on_three_lanes_and_two_groups(
    num_ranks: int, delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDLASS_SIM", f"seed=5,delay_ms={delay}")
    assert run(workers.interleave, num_ranks, 400) == [400] * num_ranks


def test_groups_of_some_ranks() -> None:
    for rank, texts in enumerate(run(workers.use_groups, 3)):
        outside, twice = texts
        assert outside == f"rank {rank} is not in group 'alone' of ranks [{(rank - 1) % 3}]"
        assert "different ranks from 0 to 2, got [0, 0]" in twice


def test_wrong_arguments_raise_where_the_call_is_made() -> None:
    for texts, counts in run(workers.refuse_arguments, 2):
        assert counts == {"counted": 0}
        assert texts == [
            "all_gather 'weights' needs an output of 2 x 3 elements of torch.float32, got 5 of torch.float32",
            "reduce_scatter '' reduces in the dtype of its output, which must hold torch.float32, got torch.bfloat16",
            "all_reduce 'norm' needs contiguous one-dimensional tensors, got shape (2, 2) with strides (2, 1)",
            "broadcast '' needs a source from 0 to 1, got 2",
            "all_to_all '' needs 2 input splits that add up to 2, got [2, 1]",
        ]


def test_works_are_late_and_do_not_hold_up_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "delay_ms=300,seed=3")
    first, second = run(workers.look_at_lateness, 2, 0.5)
    for seen in (first, second):
        assert seen["issued"] < 0.1
        assert seen["early"] == [False] * 3
        assert seen["done"] == [True] * 3
        assert seen["waited"] > 0.1
    assert first["barrier"] > 0.4  # the second rank came half a second later


@pytest.mark.parametrize("name", ["tpu-v5e", "laptop"])
def test_clock_counts_received_bytes_at_the_rate_of_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", f"machine={name},delay_ms=0")
    part, machine = 1_000_000, load_machine(name)
    received = 2 * part
    once = received / machine.network_bytes_per_s + machine.network_latency_s
    filled = 2 * (4 * part / machine.device_bandwidth_bytes_per_s + 2 * machine.launch_latency_s)  # by torch.zeros
    for in_turn, at_once in run(workers.read_clock, 3, part):
        assert in_turn == pytest.approx(2 * once + filled, rel=0.01)
        assert once <= at_once <= 1.01 * (once + filled)


@pytest.mark.parametrize(
    ("difference", "texts"),
    [
        ("kind", ("all_gather 'norm' (call 2 of its group) of 16 bytes", "rank 2 called all_reduce 'norm'")),
        ("tag", ("all_reduce 'norm' (call 2 of its group)", "all_reduce 'other' (call 2 of its group)")),
        ("bytes", ("of 16 bytes of float32", "of 20 bytes of float32")),
        ("dtype", ("of 16 bytes of float32", "of 16 bytes of int32")),
        ("barrier", ("all_reduce 'norm' (call 2 of its group)", "rank 2 called barrier")),
        ("order", ("(call 2 of its group)", "(call 3 of its group)")),
    ],
)
def test_different_calls_raise_on_every_rank(difference: str, texts: tuple[str, str]) -> None:
    for name, text, seconds in run(workers.make_different_calls, 3, difference):
        assert name == "CollectiveMismatch", text
        assert seconds < 5
        for part in texts:
            assert part in text


def test_close_does_not_wait_for_calls_that_nobody_joins() -> None:
    for seconds in run(workers.leave_in_the_middle, 2):
        assert seconds < 3
