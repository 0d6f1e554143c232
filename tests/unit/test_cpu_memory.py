"""The CPU's memory: alignment, exact accounts, budgets, and memory that is really given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import Memory, Place, Work
from windlass.backends.cpu.device import CpuAccelerator, find_matmul_dtypes, open_cpu
from windlass.backends.cpu.memory import format_bytes, read_capacity

MIB = 2**20


@pytest.fixture
def accelerator() -> Iterator[CpuAccelerator]:
    opened = open_cpu()
    yield opened
    opened.close()
    opened.close()


@pytest.fixture
def memory(accelerator: CpuAccelerator) -> Memory:
    return accelerator.memory


def used(memory: Memory, place: Place = Place.DEVICE) -> int | None:
    return memory.stats(place).used.value


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not tell the resident size")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 0, 2), (1000, 1001)])
def test_empty_is_contiguous_and_aligned(memory: Memory, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [memory.empty(shape, dtype, place) for place in (Place.DEVICE, Place.HOST) for _ in range(3)]
    for tensor in tensors:
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 128 == 0
        tensor.fill_(1)
        memory.release(tensor)
    assert used(memory) == used(memory, Place.HOST) == 0


def test_accounts_are_exact_per_place_and_tag(memory: Memory) -> None:
    one = memory.empty((1000,), torch.float32, tag="weights")
    two = memory.empty((3,), torch.bfloat16, tag="weights")
    three = memory.empty((MIB,), torch.uint8, tag="states")
    host = memory.empty((5,), torch.float64, Place.HOST, tag="states")
    stats = memory.stats()
    assert stats.used.kind == stats.reserved.kind == stats.peak.kind == "exact"
    assert stats.used.value == 4000 + 6 + MIB
    assert stats.by_tag == {"weights": 4006, "states": MIB}
    assert memory.stats(Place.HOST).by_tag == {"states": 40}
    # small ones take whole multiples of 128 bytes and one more to move their start, large ones whole pages
    assert stats.reserved.value == (4096 + 128) + (128 + 128) + MIB
    memory.release(one)
    memory.release(three)
    assert memory.stats().by_tag == {"weights": 6}
    assert memory.stats().peak.value == 4006 + MIB
    memory.reset_peak()
    assert memory.stats().peak.value == 6
    memory.release(two)
    memory.release(host)
    assert memory.stats().reserved.value == 0


def test_capacity_is_the_machines_or_less(memory: Memory) -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    capacity = memory.stats().capacity
    assert capacity.kind == "exact"
    assert capacity.value == read_capacity()
    assert 0 < (capacity.value or 0) <= int(total.split()[1]) * 1024


def test_budget_is_enforced_per_place(memory: Memory) -> None:
    memory.set_budget(2 * MIB)
    kept = memory.empty((MIB,), torch.uint8)
    with pytest.raises(
        OutOfMemory, match=r"^cpu:0 cannot hold 4.0 MiB for 'states': 1.0 MiB free of a budget of 2.0 MiB; "
    ):
        memory.empty((MIB,), torch.float32, tag="states")
    memory.release(memory.empty((4 * MIB,), torch.uint8, Place.HOST))
    memory.release(memory.empty((MIB,), torch.uint8))  # exactly what is left
    memory.release(kept)
    memory.set_budget(None)
    memory.release(memory.empty((MIB,), torch.float32, tag="states"))
    with pytest.raises(ValueError, match="number of bytes"):
        memory.set_budget(-1)


def test_more_than_the_machine_has_is_refused(memory: Memory) -> None:
    with pytest.raises(OutOfMemory, match=r"cannot hold 4096.0 TiB for 'everything'"):
        memory.empty((2**52,), torch.uint8, tag="everything")
    assert used(memory) == 0


def test_release_gives_memory_back_once_nobody_refers_to_it(memory: Memory) -> None:
    before = resident_bytes()
    tensor = memory.empty((64 * MIB,), torch.uint8).fill_(1)
    view = tensor[5:]
    assert resident_bytes() - before > 60 * MIB
    gone = weakref.ref(tensor)
    memory.release(tensor)
    del tensor
    assert gone() is None
    assert view[0] == 1  # until the last view goes, stale reads do not crash
    del view
    gc.collect()
    assert resident_bytes() - before < 8 * MIB


def test_releasing_twice_or_a_foreign_tensor_is_an_error(memory: Memory) -> None:
    tensor = memory.empty((3,), torch.float32)
    memory.release(tensor)
    with pytest.raises(ValueError, match="released before"):
        memory.release(tensor)
    with pytest.raises(ValueError, match="not allocated here"):
        memory.release(torch.empty(3))
    assert used(memory) == 0


def test_forgotten_tensor_stays_accounted_and_its_address_is_not_reused(memory: Memory) -> None:
    addresses = {memory.empty((100,), torch.float32).data_ptr() for _ in range(50)}
    assert len(addresses) == 50
    assert used(memory) == 50 * 400


class Recorded(Work):
    def __init__(self) -> None:
        self.waited = False

    def wait(self) -> None:
        self.waited = True

    def done(self) -> bool:
        return self.waited


def test_copy_and_release_happen_after_the_work(accelerator: CpuAccelerator) -> None:
    memory = accelerator.memory
    device = memory.empty((4,), torch.float32)
    host = memory.empty((4,), torch.float32, Place.HOST)
    host.copy_(torch.arange(4.0))
    first, second = Recorded(), Recorded()
    memory.copy(device, host, after=first, tag="weights").wait()
    assert first.waited
    assert device.tolist() == [0, 1, 2, 3]
    memory.copy(host, device, tag="weights").wait()
    memory.copy(device, torch.zeros(4), tag="weights").wait()
    counted = accelerator.counters.snapshot()
    assert counted["copy/up/weights"] == counted["copy/down/weights"] == {"calls": 1, "bytes": 16}
    assert counted["copy/device/weights"] == {"calls": 1, "bytes": 16}
    memory.release(device, after=second)
    assert second.waited
    for wrong in (torch.zeros(5), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="equal shapes and dtypes"):
            memory.copy(host, wrong)


def test_disk_is_not_offered(memory: Memory) -> None:
    for use in (memory.stats, memory.reset_peak):
        with pytest.raises(Unsupported, match="no place 'disk'"):
            use(Place.DISK)
    with pytest.raises(Unsupported, match="no place 'disk'"):
        memory.empty((1,), torch.float32, Place.DISK)


def test_shared_tensor_of_a_rank_alone_is_plain_memory(accelerator: CpuAccelerator) -> None:
    world = accelerator.collectives.world
    tensor = accelerator.memory.empty((7,), torch.float32, shared=world, tag="region").fill_(2)
    gathered = torch.zeros(7)
    accelerator.collectives.all_gather(gathered, tensor, world).wait()
    assert gathered.tolist() == [2.0] * 7
    accelerator.memory.release(tensor)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_sizes_that_do_not_fit_are_refused(accelerator: CpuAccelerator, count: int) -> None:
    collectives, world = accelerator.collectives, accelerator.collectives.world
    with pytest.raises(ValueError, match="all_gather 'x' needs an output of 1 x 4 elements"):
        collectives.all_gather(torch.zeros(count), torch.zeros(4), world, tag="x")
    with pytest.raises(ValueError, match="reduce_scatter 'x' needs an input of 1 x 4 elements"):
        collectives.reduce_scatter(torch.zeros(4), torch.zeros(count), world, tag="x")
    with pytest.raises(ValueError, match=r"must hold torch\.float64"):
        collectives.reduce_scatter(torch.zeros(4), torch.zeros(4, dtype=torch.float64), world)
    with pytest.raises(ValueError, match="one-dimensional"):
        collectives.all_reduce(torch.zeros(2, 2), world)
    with pytest.raises(ValueError, match="input splits that add up to 4"):
        collectives.all_to_all(torch.zeros(count), torch.zeros(4), [count], [count], world)
    assert not accelerator.counters.collectives


def test_random_state_is_restored_to_the_bit(accelerator: CpuAccelerator) -> None:
    accelerator.seed(7)
    state = accelerator.rng_state()
    first = torch.rand(5)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(5), first)
    accelerator.seed(7)
    assert torch.equal(torch.rand(5), first)


def test_declared_facts(accelerator: CpuAccelerator) -> None:
    assert accelerator.name == "cpu:0"
    assert accelerator.facts["transport"] == "alone"
    assert accelerator.facts["ranks_on_host"] == 1
    assert accelerator.capabilities.one_sided  # alone, nobody else is needed
    assert accelerator.capabilities.ordered_reduction
    assert find_matmul_dtypes(frozenset({"avx512f", "avx512_bf16"})) == ("float32", "bfloat16")
    assert find_matmul_dtypes(frozenset({"avx2"})) == ("float32",)
    with pytest.raises(ValueError, match="got index 1"):
        open_cpu(1)


def test_sizes_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * MIB // 2, 4 << 30)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "4.0 GiB",
    ]  # fmt: skip
