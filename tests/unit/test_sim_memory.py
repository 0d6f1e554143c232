"""Memory of the simulated device: exact books, 0xFF where there is nothing, and no promise that it stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sim_parts import Parts, open_parts, round_machine
from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import DoneWork, Place
from windlass.backends.sim.errors import OrderViolation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64)


@pytest.fixture
def parts() -> Iterator[Parts]:
    with open_parts() as opened:
        yield opened


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_is_aligned_and_filled_with_ones(parts: Parts, dtype: torch.dtype, place: Place) -> None:
    for shape in ((3, 5), (), (0,), (7,)):
        tensor = parts.memory.empty(shape, dtype, place, tag="t")
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 128 == 0
        assert set(raw(tensor)) <= {0xFF}
        parts.memory.release(tensor)
    assert parts.memory.stats(place).used.value == 0


def test_undeclared_dtypes_are_refused_with_advice(parts: Parts) -> None:
    for dtype in (torch.float64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(Unsupported, match="wanted for 'master'; use one of float32, bfloat16, float16"):
            parts.memory.empty((4,), dtype, tag="master")


def test_the_books_are_exact() -> None:
    with open_parts(round_machine()) as parts:
        memory = parts.memory
        one = memory.empty((100,), torch.float32, tag="weights")
        two = memory.empty((50,), torch.bfloat16, tag="gradients")
        memory.empty((10,), torch.uint8, Place.HOST, tag="weights")
        stats = memory.stats()
        assert (stats.used.value, stats.peak.value, stats.capacity.value) == (500, 500, 2**20)
        assert stats.by_tag == {"weights": 400, "gradients": 100}
        assert stats.reserved.value is not None
        assert stats.reserved.value >= 500
        memory.release(one)
        assert memory.stats().by_tag == {"gradients": 100}
        assert (memory.stats().used.value, memory.stats().peak.value) == (100, 500)
        memory.reset_peak()
        assert memory.stats().peak.value == 100
        memory.release(two)
        assert memory.stats(Place.HOST).by_tag == {"weights": 10}
        assert memory.stats(Place.DISK).capacity.value == 2**22


def test_every_tier_has_a_size_and_a_budget() -> None:
    with open_parts(round_machine()) as parts:
        memory = parts.memory
        sizes = {Place.DEVICE: 2**20, Place.HOST: 2**21, Place.DISK: 2**22}
        for place, size in sizes.items():
            whole = memory.empty((size,), torch.uint8, place)
            with pytest.raises(OutOfMemory):
                memory.empty((1,), torch.uint8, place)
            memory.release(whole)
            memory.set_budget(1000, place)
            kept = memory.empty((600,), torch.uint8, place)
            with pytest.raises(OutOfMemory, match="400 B free of a budget of 1000 B"):
                memory.empty((401,), torch.uint8, place)
            memory.release(memory.empty((400,), torch.uint8, place))
            memory.set_budget(None, place)
            memory.empty((401,), torch.uint8, place)
            assert kept.numel() == 600
        with pytest.raises(ValueError, match="a budget is a number of bytes from 0, or None, got -1"):
            memory.set_budget(-1)


def test_out_of_memory_says_what_where_and_what_to_do() -> None:
    with open_parts(round_machine()) as parts:
        parts.memory.empty((2**19,), torch.uint8)
        with pytest.raises(OutOfMemory) as raised:
            parts.memory.empty((2**18,), torch.float32, tag="master")
        assert str(raised.value) == (
            "sim:0 cannot hold 1.0 MiB for 'master': 512.0 KiB free of 1.0 MiB; shard over more ranks, use smaller "
            "buckets, or raise the budget"
        )
        with pytest.raises(OutOfMemory, match=r"the disk of sim:0 cannot hold 8\.0 MiB"):
            parts.memory.empty((2**21,), torch.float32, Place.DISK)


# -- releasing ---------------------------------------------------------------------------------------------------


def test_released_memory_is_poisoned_and_may_not_be_used(parts: Parts) -> None:
    tensor = parts.memory.empty((8,), torch.float32, tag="reduced").fill_(1.0)
    part, kept = tensor[2:4], tensor.numpy()
    parts.memory.release(tensor)
    uses: list[Callable[[], object]] = [lambda: part + 1, tensor.zero_, lambda: torch.cat([part, part])]
    for use in uses:
        with pytest.raises(OrderViolation, match="uses allocation 'reduced', which was released before"):
            use()
    assert kept.tobytes() == b"\xff" * 32
    with pytest.raises(OrderViolation, match="released before"):
        parts.memory.copy(torch.zeros(2), part)


def test_releasing_twice_or_something_foreign_is_refused(parts: Parts) -> None:
    tensor = parts.memory.empty((8,), torch.float32, tag="reduced")
    parts.memory.release(tensor)
    with pytest.raises(ValueError, match=r"shape \(8,\): allocation 'reduced' was released before"):
        parts.memory.release(tensor)
    with pytest.raises(ValueError, match="it was not allocated here"):
        parts.memory.release(torch.zeros(3))


def test_a_release_after_a_work_drops_the_account_at_once_and_the_bytes_later(parts: Parts) -> None:
    gate = threading.Event()
    source = parts.memory.empty((4,), torch.float32).fill_(3.0)
    target, kept = torch.zeros(4), source.numpy()
    work = parts.collective([source], [target], gate)
    parts.memory.release(source, after=work)
    assert parts.memory.stats().used.value == 0
    time.sleep(0.01)
    assert kept.tolist() == [3.0] * 4
    with pytest.raises(OrderViolation, match="released before"):
        source.sum()
    gate.set()
    work.wait()
    parts.streams.synchronize()
    assert kept.tobytes() == b"\xff" * 16
    assert target.tolist() == [3.0] * 4


def test_a_release_that_waits_for_nothing_races_with_a_work(parts: Parts) -> None:
    gate = threading.Event()
    source = parts.memory.empty((4,), torch.float32, tag="packed").fill_(3.0)
    event = parts.streams.record()
    with parts.streams.lane("reduce"):
        parts.streams.wait(event)
        work = parts.collective([source], [torch.empty(4)], gate, what="reduce_scatter 'gradients'")
    with pytest.raises(OrderViolation) as raised:
        parts.memory.release(source, after=event)
    assert str(raised.value) == (
        "release on lane compute writes bytes 0 to 16 of allocation 'packed', which reduce_scatter 'gradients' on lane "
        "reduce reads, and nothing orders the two; call wait() of that work on lane compute first"
    )
    assert parts.memory.stats().used.value == 16
    gate.set()
    work.wait()
    parts.memory.release(source, after=parts.streams.record())
    assert parts.memory.stats().used.value == 0


def test_an_address_that_is_used_again_is_no_ghost(parts: Parts) -> None:
    for _ in range(300):
        tensor = parts.memory.empty((4,), torch.float32, tag="wide").fill_(1.0)
        assert torch.ones(4).add_(tensor).sum() == 8
        parts.memory.release(tensor)
        del tensor
    parts.streams.boundary()
    assert len(parts.conductor.storages.all()) < 10


# -- copies ------------------------------------------------------------------------------------------------------


def test_copies_go_between_all_places_and_are_counted_by_kind(parts: Parts) -> None:
    memory = parts.memory
    values = torch.arange(6.0)
    for source in Place:
        for destination in Place:
            one, two = (memory.empty((6,), torch.float32, place) for place in (source, destination))
            one.copy_(values)
            memory.copy(two, one, tag=f"{source.value} to {destination.value}").wait()
            assert two.tolist() == values.tolist()
    assert {tag: kind for kind, tag in parts.counters.copies} == {
        "device to device": "device", "device to host": "down", "device to disk": "down",
        "host to device": "up", "host to host": "host", "host to disk": "host",
        "disk to device": "up", "disk to host": "host", "disk to disk": "host",
    }  # fmt: skip
    assert {tally.bytes for tally in parts.counters.copies.values()} == {24}


def test_a_copy_is_not_there_before_it_is_waited_for(parts: Parts) -> None:
    source = parts.memory.empty((4,), torch.float32, Place.HOST, tag="state").fill_(1.0)
    target = parts.memory.empty((4,), torch.float32, tag="staging")
    event = parts.streams.record()
    with parts.streams.lane("up"):
        parts.streams.wait(event)
        work = parts.memory.copy(target, source, tag="offload")
    with pytest.raises(OrderViolation, match="which copy 'offload' on lane up writes"):
        target.sum()
    with pytest.raises(OrderViolation, match="which copy 'offload' on lane up reads"):
        source.zero_()
    assert source.sum() == 4  # reading what it reads is no race
    work.wait()
    assert target.add_(source.zero_()).tolist() == [1.0] * 4


def test_a_copy_after_another_follows_it(parts: Parts) -> None:
    one, two, three = (parts.memory.empty((4,), torch.float32).fill_(value) for value in (1.0, 2.0, 3.0))
    first = parts.memory.copy(two, one)
    parts.memory.copy(three, two, after=first).wait()
    assert three.tolist() == [1.0] * 4
    parts.memory.copy(three, one, after=DoneWork()).wait()


def test_copies_do_not_cast(parts: Parts) -> None:
    with pytest.raises(ValueError, match=r"copy 'x' needs equal shapes and dtypes, got .* kernel scale_cast"):
        parts.memory.copy(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), tag="x")


def test_strided_and_empty_tensors_are_copied(parts: Parts) -> None:
    target = parts.memory.empty((4, 4), torch.float32).zero_()
    parts.memory.copy(target[:, 1], torch.arange(4.0)).wait()
    parts.memory.copy(target[:0], torch.zeros(0, 4)).wait()
    assert target.sum() == 6
    assert target[:, 1].tolist() == [0.0, 1.0, 2.0, 3.0]


# -- boundaries --------------------------------------------------------------------------------------------------


def test_at_a_boundary_an_allocation_moves_and_its_slices_stay_behind(parts: Parts) -> None:
    tensor = parts.memory.empty((8,), torch.float32, tag="weights").copy_(torch.arange(8.0))
    kept, address, bytes_of_old = tensor[2:4], tensor.data_ptr(), tensor[2:4].numpy()
    parts.streams.boundary()
    assert tensor.tolist() == list(range(8))
    assert tensor.data_ptr() != address
    assert tensor.data_ptr() % 128 == 0
    assert bytes_of_old.tobytes() == b"\xff" * 8
    uses: list[Callable[[], object]] = [kept.sum, kept.zero_, lambda: parts.memory.copy(kept, torch.zeros(2))]
    for use in uses:
        with pytest.raises(OrderViolation, match="uses allocation 'weights', which was moved at the boundary: a slice"):
            use()
    with pytest.raises(ValueError, match="was moved at the boundary"):
        parts.memory.release(kept)
    tensor[2:4].zero_()  # a new slice is good
    assert tensor.sum() == 0 + 1 + 4 + 5 + 6 + 7
    assert parts.memory.stats().used.value == 32
    parts.memory.release(tensor)


def test_with_views_nothing_moves() -> None:
    with open_parts(views=True) as parts:
        tensor = parts.memory.empty((8,), torch.float32).zero_()
        kept = tensor[2:4]
        parts.streams.boundary()
        kept.fill_(1.0)
        assert tensor.sum() == 2


@pytest.mark.parametrize("place", list(Place))
def test_every_place_moves(parts: Parts, place: Place) -> None:
    tensor = parts.memory.empty((4,), torch.bfloat16, place).fill_(2.0)
    kept = tensor[1:]
    parts.streams.boundary()
    assert tensor.tolist() == [2.0] * 4
    with pytest.raises(OrderViolation, match="moved at the boundary"):
        kept.sum()


def test_what_a_work_may_still_use_does_not_move(parts: Parts) -> None:
    gate = threading.Event()
    source = parts.memory.empty((4,), torch.float32, tag="source").fill_(1.0)
    target = parts.memory.empty((4,), torch.float32, tag="target").fill_(1.0)
    work = parts.collective([source], [target], gate)
    addresses = source.data_ptr(), target.data_ptr()
    parts.streams.boundary()
    assert (source.data_ptr(), target.data_ptr()) == addresses
    gate.set()
    while not work.done():
        time.sleep(0.001)
    parts.streams.boundary()  # over, and nobody knows
    assert (source.data_ptr(), target.data_ptr()) == addresses
    work.wait()
    assert target.sum() == 4
    parts.streams.boundary()
    assert source.data_ptr() != addresses[0]
    assert target.data_ptr() != addresses[1]
    assert target.sum() == 4


def test_what_moved_is_as_ordered_as_before(parts: Parts) -> None:
    tensor = parts.memory.empty((4,), torch.float32, tag="weights").fill_(1.0)
    parts.streams.boundary()
    with (
        parts.streams.lane("gather"),
        pytest.raises(OrderViolation, match=r"aten\.fill_\.Scalar on lane compute writes"),
    ):
        parts.collective([tensor], [parts.memory.empty((4,), torch.float32)])


def test_parameters_and_tensors_of_inference_mode_move(parts: Parts) -> None:
    with torch.inference_mode():
        tensor = parts.memory.empty((4,), torch.float32).fill_(1.0)
        target = torch.zeros(4)
    parts.memory.copy(target, tensor).wait()
    assert target.sum() == 4
    tensor.requires_grad_()
    parts.streams.boundary()
    with torch.inference_mode():
        parts.streams.boundary()
    (tensor * 2).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [2.0] * 4


def test_many_steps_leave_nothing_behind(parts: Parts) -> None:
    def held() -> Any:
        return len(parts.conductor.storages.all()), parts.memory.stats().used.value

    weights = parts.memory.empty((64,), torch.float32, tag="weights").zero_()
    parts.streams.boundary()
    before = held()
    for _ in range(200):
        event = parts.streams.record()
        gathered = parts.memory.empty((64,), torch.float32, tag="gathered")
        with parts.streams.lane("gather"):
            parts.streams.wait(event)
            work = parts.collective([weights], [gathered])
        work.wait()
        weights.add_(gathered, alpha=0.0).add_(1.0)
        parts.memory.release(gathered)
        del gathered, work
        parts.streams.boundary()
    assert weights.tolist() == [200.0] * 64
    assert held() == before
