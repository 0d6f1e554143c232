"""What makes a lazy device run a program, and that all ranks run the same."""

from __future__ import annotations

import pytest
import torch

import xla_workers as workers
from windlass.accelerator.interface import LANES, Place
from windlass.backends.xla.device import XlaAccelerator
from windlass.conformance.rank_pool import run_ranks


def test_lanes_run_nothing(accelerator: XlaAccelerator) -> None:
    total = torch.zeros(13).to(accelerator.device)
    accelerator.streams.synchronize()
    before = accelerator.program_counts().executed
    for lane in LANES:
        with accelerator.streams.lane(lane):
            total.add_(2.0)
            event = accelerator.streams.record()
        accelerator.streams.wait(event)
        assert event.done()
    assert accelerator.program_counts().executed == before
    accelerator.streams.boundary()
    assert accelerator.program_counts().executed == before + 1
    accelerator.streams.boundary()
    assert accelerator.program_counts().executed == before + 1, "nothing was pending"
    assert accelerator.to_host(total).tolist() == [10.0] * 13


def test_a_read_after_the_boundary_runs_nothing(accelerator: XlaAccelerator) -> None:
    statistics = torch.zeros(3).to(accelerator.device)
    accelerator.streams.synchronize()
    before = accelerator.program_counts().executed
    statistics.add_(torch.arange(3.0).to(accelerator.device))
    accelerator.streams.boundary()
    assert accelerator.read_host(statistics, tag="test") == [0.0, 1.0, 2.0]
    assert accelerator.program_counts().executed == before + 1


def test_a_read_runs_everything_once(accelerator: XlaAccelerator) -> None:
    one, other = (torch.ones(7).to(accelerator.device) for _ in range(2))
    accelerator.streams.synchronize()
    before = accelerator.program_counts().executed
    one.add_(1.0)
    other.sub_(1.0)
    assert accelerator.to_host(one[2:4]).tolist() == [2.0, 2.0]
    assert accelerator.to_host(other).tolist() == [0.0] * 7
    assert accelerator.program_counts().executed == before + 1


def test_copies_within_the_device_run_nothing(accelerator: XlaAccelerator) -> None:
    memory = accelerator.memory
    source, target = memory.empty((9,), torch.float32), memory.empty((9,), torch.float32)
    host = memory.empty((9,), torch.float32, Place.HOST)
    host.copy_(torch.arange(9.0))
    accelerator.streams.synchronize()
    before = accelerator.program_counts().executed
    memory.copy(source, host).wait()
    memory.copy(target, source).wait()
    memory.copy(target[:3], source[6:]).wait()
    assert accelerator.program_counts().executed == before
    assert accelerator.to_host(target).tolist() == [6.0, 7.0, 8.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    for tensor in (source, target, host):
        memory.release(tensor)


def test_a_number_that_is_copied_up_is_data(accelerator: XlaAccelerator) -> None:
    """torch_xla would write 0, 1 and -1 into the program."""
    rate, total = accelerator.memory.empty((), torch.float32), torch.zeros(21).to(accelerator.device)
    compiled = []
    for number in (0.5, 0.0, 1.0, -1.0, 3.0):
        accelerator.streams.boundary()
        accelerator.memory.copy(rate, torch.tensor(number))
        total.add_(rate * rate)
        accelerator.streams.boundary()
        compiled.append(accelerator.program_counts().compiled)
    assert accelerator.to_host(total).tolist() == [0.25 + 0.0 + 1.0 + 1.0 + 9.0] * 21
    assert compiled == [compiled[0]] * 5
    accelerator.memory.release(rate)


def test_random_numbers_do_not_depend_on_where_programs_are_cut(accelerator: XlaAccelerator) -> None:
    def draw(cut: bool) -> list[torch.Tensor]:
        accelerator.seed(3)
        drawn = []
        for _ in range(4):
            drawn.append(torch.rand(50, device=accelerator.device))
            if cut:
                accelerator.streams.boundary()
                accelerator.to_host(drawn[-1][:2])
        return [accelerator.to_host(one) for one in drawn]

    whole, cut = draw(False), draw(True)
    assert [torch.equal(one, other) for one, other in zip(whole, cut, strict=True)] == [True] * 4
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_seed_is_no_constant_of_the_program(accelerator: XlaAccelerator, seed: int) -> None:
    def draw_once(with_seed: int) -> int:
        accelerator.seed(with_seed)
        torch.rand(31, device=accelerator.device).mul(2.0).sum().add_(0.0)
        drawn = torch.rand(31, device=accelerator.device)
        accelerator.streams.boundary()
        del drawn
        return accelerator.program_counts().compiled

    assert draw_once(12345) == draw_once(seed)


def test_collectives_of_a_rank_alone_run_nothing(accelerator: XlaAccelerator) -> None:
    collectives, world = accelerator.collectives, accelerator.collectives.world
    given, output, narrow = (torch.zeros(10, device=accelerator.device) for _ in range(3))
    half = torch.zeros(10, device=accelerator.device, dtype=torch.bfloat16)
    accelerator.streams.synchronize()
    before = accelerator.program_counts().executed
    given.add_(torch.arange(10.0).to(accelerator.device))
    half.copy_(given)
    collectives.all_gather(output, given, world).wait()
    collectives.reduce_scatter(narrow, half, world).wait()
    collectives.reduce_scatter(given[:4], given[4:8], world).wait()
    collectives.all_to_all(output[:5], given[:5], [5], [5], world).wait()
    collectives.all_reduce(output, world, op="max").wait()
    collectives.broadcast(output, 0, world).wait()
    collectives.barrier(world)
    assert accelerator.program_counts().executed == before
    assert accelerator.to_host(narrow).tolist() == list(range(10))
    assert accelerator.to_host(output).tolist() == [4.0, 5.0, 6.0, 7.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_a_collective_through_the_host_cuts_the_program_once() -> None:
    for executed in run_ranks(workers.count_host_trips, 2, accelerator="xla:0"):
        assert set(executed.values()) == {1}, executed


def test_hashes_of_programs_over_ranks() -> None:
    first, second = run_ranks(workers.hash_programs, 2, accelerator="xla:0")
    assert first["offset as data"] == second["offset as data"]
    assert first["offset as a number"] != second["offset as a number"]
    assert first["offset as data"] != first["offset as a number"]


def test_ranks_with_different_programs_are_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_DEBUG", "1")
    found = run_ranks(workers.come_to_boundaries, 3, 1, accelerator="xla:0")
    sentences = {sentence for sentence, _ in found}
    assert len(sentences) == 1
    (sentence,) = sentences
    assert "different programs at boundary 2" in sentence
    assert "on ranks 0, 2 and " in sentence
    assert sentence.partition(" and ")[2].partition(";")[0].endswith("on rank 1")
    assert [values for _, values in found] == [[3.0] * 4] * 3


def test_without_debug_mode_programs_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WINDLASS_DEBUG", raising=False)
    assert [sentence for sentence, _ in run_ranks(workers.come_to_boundaries, 2, 1, accelerator="xla:0")] == ["", ""]


def test_results_come_in_the_order_of_calls_to_whoever_waits() -> None:
    for found in run_ranks(workers.deliver_in_order, 2, accelerator="xla", timeout=240):
        assert found == [[20.0, 21.0], [3.0, 3.0], [3.0, 3.0]]
