"""Memory of the generic base: exact books, releases that wait for their last use, host pages locked and exact."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from fake_plugins import raises_sentence
from recorded_device import RecordedModule, RecordedRuntime, with_runtime
from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import Measure, Place, Streams
from windlass.backends.generic.host_memory import HostAllocator, find_page_lock
from windlass.backends.generic.memory import DeviceMemory
from windlass.backends.generic.streams import DeviceLanes

FLOAT = torch.float32
HOST = torch.device("cpu")


@pytest.fixture
def module() -> RecordedModule:
    return RecordedModule()


@pytest.fixture
def lanes(module: RecordedModule) -> DeviceLanes:
    opened = DeviceLanes(module)
    module.forget()
    return opened


@pytest.fixture
def counters() -> Counters:
    return Counters()


def make_memory(module: Any, streams: Streams, counters: Counters, host: HostAllocator | None = None) -> DeviceMemory:
    device = torch.device("cpu")  # a device whose tensors compute; what the module records is the rest
    return DeviceMemory("gpu:0", device, module, streams, counters, host or HostAllocator(), ("float32", "bfloat16"))


@pytest.fixture
def memory(module: RecordedModule, lanes: DeviceLanes, counters: Counters) -> DeviceMemory:
    return make_memory(module, lanes, counters)


def used(memory: DeviceMemory) -> int | None:
    return memory.stats().used.value


def test_a_release_keeps_the_tensor_until_its_last_use_elsewhere(
    memory: DeviceMemory, lanes: DeviceLanes, module: RecordedModule
) -> None:
    tensor = memory.empty((25,), FLOAT, tag="shard")
    storage = weakref.ref(tensor.untyped_storage())
    with lanes.lane("gather"):
        sent = lanes.record()
    memory.release(tensor, after=sent)
    del tensor
    assert used(memory) == 100
    assert not sent.done()
    module.events[0].happened = True
    assert used(memory) == 0
    assert memory.stats().by_tag == {}
    assert storage() is None
    assert all("record_stream" not in line for line in module.log)


def test_a_release_in_stream_order_gives_back_at_once(memory: DeviceMemory, lanes: DeviceLanes) -> None:
    one, other = memory.empty((25,), FLOAT), memory.empty((25,), FLOAT)
    computed = lanes.record()  # on the stream that was current when they were allocated
    memory.release(one, after=computed)
    memory.release(other)
    assert not computed.done()
    assert used(memory) == 0


def test_a_release_from_another_lane_waits_for_that_lane(
    memory: DeviceMemory, lanes: DeviceLanes, module: RecordedModule
) -> None:
    tensor = memory.empty((25,), FLOAT)
    with lanes.lane("reduce"):
        memory.release(tensor)
    assert used(memory) == 100
    module.events[0].happened = True
    assert used(memory) == 0


def test_what_is_being_released_is_waited_for_before_an_allocation_is_refused(
    memory: DeviceMemory, lanes: DeviceLanes, module: RecordedModule
) -> None:
    memory.set_budget(150)
    tensor = memory.empty((25,), FLOAT)
    with lanes.lane("gather"):
        memory.release(tensor)
    second = memory.empty((25,), FLOAT)
    assert module.log[-1] == "host waits for e0"
    with raises_sentence(
        OutOfMemory,
        "gpu:0 cannot hold 100 B for 'third': 50 B free of a budget of 150 B; shard over more ranks, use smaller "
        "buckets, or raise the budget",
    ):
        memory.empty((25,), FLOAT, tag="third")
    memory.release(second)
    assert memory.stats().peak == Measure("exact", 100)


def test_closing_waits_for_releases(memory: DeviceMemory, lanes: DeviceLanes) -> None:
    tensor = memory.empty((25,), FLOAT)
    with lanes.lane("gather"):
        memory.release(tensor)
    memory.close()
    assert used(memory) == 0


def test_releasing_twice_or_a_foreign_tensor(memory: DeviceMemory, lanes: DeviceLanes) -> None:
    tensor = memory.empty((5, 5), FLOAT)
    with lanes.lane("gather"):
        memory.release(tensor)
    for what in (tensor, torch.empty(5, 5)):
        with raises_sentence(
            ValueError,
            "gpu:0 cannot release a tensor of shape (5, 5): it was not allocated here, or was released before",
        ):
            memory.release(what)


def test_copies_are_points_of_the_lane_that_issued_them(
    memory: DeviceMemory, lanes: DeviceLanes, module: RecordedModule, counters: Counters
) -> None:
    source, destination = memory.empty((4,), FLOAT, Place.HOST).fill_(3), memory.empty((4,), FLOAT)
    computed = lanes.record()
    with lanes.lane("up"):
        work = memory.copy(destination, source, after=computed, tag="weights")
        up = lanes.current.name
    assert module.log == ["e0 on s0", f"{up} waits for e0", f"e1 on {up}"]
    assert not work.done()
    assert destination.tolist() == [3.0] * 4
    assert (counters.copies["up", "weights"].calls, counters.copies["up", "weights"].bytes) == (1, 16)


def test_a_copy_on_the_host_waits_for_what_the_lane_waits_for(
    memory: DeviceMemory, lanes: DeviceLanes, module: RecordedModule
) -> None:
    device = memory.empty((3,), FLOAT)
    arrived, kept = (memory.empty((3,), FLOAT, Place.HOST) for _ in range(2))
    with lanes.lane("down"):
        down = memory.copy(arrived, device)
    module.log.clear()
    memory.copy(kept, arrived, after=down)
    assert module.log == ["s0 waits for e0", "e1 on s0", "host waits for e1", "e2 on s0"]


def test_the_module_tells_what_is_reserved_and_there(memory: DeviceMemory) -> None:
    stats = memory.stats()
    assert (stats.reserved, stats.capacity) == (Measure("exact", 2**20), Measure("exact", 2**30))
    with raises_sentence(
        OutOfMemory,
        "gpu:0 cannot hold 2.0 GiB for 'much': 0 B of 1.0 GiB are in use by windlass; shard over more ranks, use "
        "smaller buckets, or raise the budget",
    ):
        memory.empty((2**29,), FLOAT, tag="much")


def test_what_the_module_does_not_tell_is_unknown(counters: Counters) -> None:
    memory = make_memory(torch.get_device_module("cpu"), Streams(), counters)
    tensor = memory.empty((3,), FLOAT)
    stats = memory.stats()
    assert (stats.used, stats.capacity.kind, stats.reserved.kind) == (Measure("exact", 12), "unknown", "estimate")
    memory.release(tensor)


def test_what_the_device_refuses_is_out_of_memory(
    memory: DeviceMemory, lanes: DeviceLanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = memory.empty((25,), FLOAT)
    with lanes.lane("gather"):
        memory.release(tensor)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room\nsecond line")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OutOfMemory, match=r"^gpu:0 cannot hold 100 B for 'next': .* \(no room\)$"):
        memory.empty((25,), FLOAT, tag="next")
    assert used(memory) == 0  # the release was waited for before the second try


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_a_dtype_that_is_not_declared(memory: DeviceMemory, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with raises_sentence(Unsupported, f"gpu:0 does not declare {name}; use float32, bfloat16, or whole numbers"):
        memory.empty((3,), dtype)
    assert used(memory) == 0


def test_host_memory_is_locked_in_exact_size_and_unlocked(
    module: RecordedModule, lanes: DeviceLanes, counters: Counters
) -> None:
    runtime = RecordedRuntime()
    host = HostAllocator(find_page_lock(with_runtime(runtime), HOST))
    memory = make_memory(module, lanes, counters, host)
    tensor = memory.empty((5000,), FLOAT, Place.HOST)
    assert runtime.locked == {tensor.data_ptr(): 5 * 4096}  # whole pages, not a power of two
    assert memory.stats(Place.HOST).used == Measure("exact", 20000)
    assert memory.stats(Place.HOST).reserved == Measure("exact", 5 * 4096)
    tensor.fill_(1)
    memory.release(tensor)  # the device may still be reading
    assert len(runtime.locked) == 1
    module.events[0].happened = True
    assert memory.stats(Place.HOST).used == Measure("exact", 0)
    assert runtime.locked == {}


def test_closing_unlocks_the_host_memory_that_is_still_used(
    module: RecordedModule, lanes: DeviceLanes, counters: Counters
) -> None:
    runtime = RecordedRuntime()
    memory = make_memory(module, lanes, counters, HostAllocator(find_page_lock(with_runtime(runtime), HOST)))
    kept, tensor = memory.empty((10,), FLOAT), memory.empty((10,), FLOAT, Place.HOST).fill_(3)
    module.log.clear()
    memory.close()
    memory.close()
    assert module.log == ["host waits for all"]  # a copy may be under way
    assert runtime.locked == {}
    assert tensor.tolist() == [3.0] * 10
    memory.release(tensor)
    memory.release(kept)
    module.synchronize()
    assert memory.stats(Place.HOST).used == memory.stats().used == Measure("exact", 0)


def test_host_memory_that_cannot_be_locked(module: RecordedModule, lanes: DeviceLanes, counters: Counters) -> None:
    runtime = RecordedRuntime()
    runtime.status = 2
    memory = make_memory(module, lanes, counters, HostAllocator(find_page_lock(with_runtime(runtime), HOST)))
    with pytest.raises(OutOfMemory, match=r"^the host memory of gpu:0 cannot hold .*locking 4096 bytes .* status 2\)$"):
        memory.empty((10,), FLOAT, Place.HOST)


def test_how_host_memory_is_had() -> None:
    assert find_page_lock(torch.get_device_module("cpu"), HOST) is None
    kinds = [HostAllocator(lambda buffer: lambda: None), HostAllocator(torch_pins=True), HostAllocator()]
    assert [host.kind for host in kinds] == ["page-locked, exact", "page-locked by torch", "pageable"]
