"""Memory of the GPU and of the host beside it: reuse after the last use, exact page-locked memory, copies, budgets."""

from __future__ import annotations

import time

import pytest
import torch

from windlass.accelerator.errors import OutOfMemory
from windlass.accelerator.interface import Measure, Place
from windlass.backends.cpu.shared_pages import round_to_pages
from windlass.backends.cuda.device import CudaAccelerator

HALF_A_SECOND = 900_000_000  # cycles
COUNT = 16 * 2**20  # floats: 64 MiB


def test_memory_is_not_used_again_before_its_last_use_is_over(accelerator: CudaAccelerator) -> None:
    memory, lanes = accelerator.memory, accelerator.streams
    before = memory.stats().used.value or 0
    tensor = memory.empty((COUNT,), torch.float32, tag="shard").fill_(1)
    filled = lanes.record()
    with lanes.lane("gather"):
        filled.wait()
        accelerator.module._sleep(HALF_A_SECOND)
        read = tensor.clone()
        used = lanes.record()
    address = tensor.data_ptr()
    memory.release(tensor, after=used)
    del tensor
    other = memory.empty((COUNT,), torch.float32, tag="other").fill_(2)
    assert other.data_ptr() != address
    assert memory.stats().used.value == before + 2 * 4 * COUNT
    used.block()
    assert memory.stats().used.value == before + 4 * COUNT
    assert accelerator.to_host(read.min()).item() == accelerator.to_host(read.max()).item() == 1.0
    reserved = memory.stats().reserved
    again = memory.empty((COUNT,), torch.float32, tag="again")
    assert memory.stats().reserved == reserved  # torch has it back, and gives it out again
    memory.release(other)
    memory.release(again)


def test_what_is_released_where_it_was_allocated_is_free_at_once(accelerator: CudaAccelerator) -> None:
    memory = accelerator.memory
    before = memory.stats().used.value
    accelerator.module._sleep(HALF_A_SECOND)
    tensor = memory.empty((COUNT,), torch.float32).fill_(1)
    memory.release(tensor)
    assert memory.stats().used.value == before


def test_page_locked_memory_has_the_size_that_was_asked_for(accelerator: CudaAccelerator) -> None:
    memory, nbytes = accelerator.memory, 5 * 2**20 + 3
    before = memory.stats(Place.HOST)
    tensor = memory.empty((nbytes,), torch.uint8, Place.HOST, tag="slab")
    after = memory.stats(Place.HOST)
    assert tensor.data_ptr() % 128 == 0
    assert (after.used.value or 0) - (before.used.value or 0) == nbytes
    assert (after.reserved.value or 0) - (before.reserved.value or 0) == round_to_pages(nbytes)
    assert accelerator.facts["coherent"] or tensor.is_pinned()
    memory.release(tensor)
    accelerator.streams.synchronize()
    assert memory.stats(Place.HOST).used == before.used


def test_copies_up_and_down_leave_the_host_free(accelerator: CudaAccelerator) -> None:
    memory, lanes = accelerator.memory, accelerator.streams
    source = memory.empty((COUNT,), torch.float32, Place.HOST, tag="up").copy_(torch.arange(COUNT) % 1000)
    middle = memory.empty((COUNT,), torch.float32, tag="middle")
    target = memory.empty((COUNT,), torch.float32, Place.HOST, tag="down").zero_()
    lanes.synchronize()
    begun = time.perf_counter()
    with lanes.lane("up"):
        accelerator.module._sleep(HALF_A_SECOND)
        up = memory.copy(middle, source, tag="up")
    with lanes.lane("down"):
        down = memory.copy(target, middle, after=up, tag="down")
    issued = time.perf_counter() - begun
    assert not down.done()
    lanes.synchronize()
    assert issued < 0.1
    assert down.done()
    assert torch.equal(target, source)
    for tensor in (source, middle, target):
        memory.release(tensor)


def test_strided_memory_of_the_host_is_copied_right(accelerator: CudaAccelerator) -> None:
    memory = accelerator.memory
    host = memory.empty((64, 64), torch.float32, Place.HOST).zero_()
    device = torch.arange(64.0 * 64, device=accelerator.device).view(64, 64)
    accelerator.module._sleep(HALF_A_SECOND)
    device.mul_(2)
    memory.copy(host.t(), device).wait()
    accelerator.streams.synchronize()
    assert torch.equal(host.t(), torch.arange(64.0 * 64).view(64, 64) * 2)
    memory.release(host)


def test_a_budget_is_kept(accelerator: CudaAccelerator) -> None:
    memory = accelerator.memory
    used = memory.stats().used.value or 0
    memory.set_budget(used + 1000)
    try:
        with pytest.raises(OutOfMemory, match=r"^cuda:0 cannot hold 3\.9 KiB for 'much': 1000 B free of a budget of "):
            memory.empty((1000,), torch.float32, tag="much")
    finally:
        memory.set_budget(None)


def test_what_the_device_does_not_have_is_out_of_memory(accelerator: CudaAccelerator) -> None:
    capacity = accelerator.memory.stats().capacity
    assert capacity.kind == "exact"
    used = accelerator.memory.stats().used
    with pytest.raises(OutOfMemory, match="are in use by windlass"):
        accelerator.memory.empty((2 * (capacity.value or 0),), torch.uint8, tag="much")
    with pytest.raises(OutOfMemory, match="out of memory"):  # by the books it fits, but the runtime needs some itself
        accelerator.memory.empty(((capacity.value or 0) - (used.value or 0),), torch.uint8, tag="all")
    assert accelerator.memory.stats().used == used
    assert accelerator.read_host(torch.ones(1, device=accelerator.device), tag="test") == [1.0]  # and nothing is left


def test_host_memory_that_cannot_be_locked_leaves_no_error_behind(accelerator: CudaAccelerator) -> None:
    from windlass.backends.generic.host_memory import find_page_lock

    lock = find_page_lock(accelerator.module, accelerator.device)
    assert lock is not None
    tensor = accelerator.memory.empty((4096,), torch.uint8, Place.HOST)
    if tensor.is_pinned():  # locking it twice fails
        with pytest.raises(RuntimeError, match="locking 4096 bytes of host memory fails with status"):
            lock(tensor)
    assert accelerator.read_host(torch.ones(1, device=accelerator.device) + 1, tag="test") == [2.0]
    accelerator.memory.release(tensor)


def test_the_same_draws_follow_a_restored_state(accelerator: CudaAccelerator) -> None:
    accelerator.seed(7)
    state = accelerator.rng_state()
    first = [accelerator.to_host(torch.rand(100, device=accelerator.device)), torch.rand(100)]
    accelerator.set_rng_state(state)
    second = [accelerator.to_host(torch.rand(100, device=accelerator.device)), torch.rand(100)]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_known(accelerator: CudaAccelerator) -> None:
    facts, capacity = accelerator.facts, accelerator.memory.stats().capacity
    assert isinstance(capacity, Measure)
    assert facts["model"] in accelerator.module.get_device_name(0)
    assert facts["memory_bytes"] == pytest.approx(capacity.value, rel=0.05)
    assert len(facts["pci_address"]) == 12
    assert accelerator.allocator_facts()["reserved_bytes"] >= 0
    assert accelerator.capabilities.asynchronous_lanes
    assert not accelerator.capabilities.shared_device
