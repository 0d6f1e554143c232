"""Level 0: the host and the disk as places apart from the device."""

from __future__ import annotations

import pytest
import torch

from windlass.accelerator.counters import Tally
from windlass.accelerator.errors import OutOfMemory
from windlass.accelerator.interface import Accelerator, Place
from windlass.conformance.allocations import allocated, assert_holds, assert_same_bits, peak, random_bits, used
from windlass.conformance.refusals import refused
from windlass.conformance.requirements import requires

MIB = 2**20
VALUES = random_bits(5001, torch.int32, seed=3)
BLANK = torch.zeros(5001, dtype=torch.int32)
APART = pytest.mark.parametrize("place", [Place.HOST, Place.DISK], ids=lambda place: str(place.value))


def needs_place(place: Place) -> str:
    return f"{place.value}_place"


@requires(
    level=0, must="The memory of the host is the host's: any torch operation of the host reads it.", needs="host_place"
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (70_001,)], ids=str)
def test_host_memory(accelerator: Accelerator, shape: tuple[int, ...]) -> None:
    tensor = accelerator.memory.empty(shape, torch.float32, Place.HOST)
    assert tensor.device.type == "cpu"
    assert tuple(tensor.shape) == shape
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 128 == 0
    values = torch.randn(shape)
    tensor.copy_(values)
    assert_same_bits(tensor.clone(), values)
    accelerator.memory.release(tensor)


@requires(
    level=0,
    must="Each place has an account of its own: used, peak and tags of one say nothing about another.",
    needs=needs_place,
)
@APART
def test_accounts_are_apart(accelerator: Accelerator, place: Place) -> None:
    memory = accelerator.memory
    memory.reset_peak(place)
    device, elsewhere = memory.stats(), used(accelerator, place)
    tensor = memory.empty((5001,), torch.float32, place, tag="conformance elsewhere")
    assert used(accelerator, place) == elsewhere + 20_004
    assert memory.stats(place).by_tag["conformance elsewhere"] == 20_004
    assert memory.stats().by_tag.get("conformance elsewhere", 0) == 0
    assert (memory.stats().used, memory.stats().peak) == (device.used, device.peak)
    own = memory.empty((77,), torch.uint8, tag="conformance here")
    assert used(accelerator, place) == elsewhere + 20_004
    assert memory.stats(place).by_tag.get("conformance here", 0) == 0
    memory.release(tensor)
    assert (used(accelerator, place), peak(accelerator, place)) == (elsewhere, elsewhere + 20_004)
    memory.reset_peak()
    assert peak(accelerator, place) == elsewhere + 20_004
    memory.reset_peak(place)
    assert peak(accelerator, place) == elsewhere
    memory.release(own)


@requires(level=0, must="A budget belongs to one place and limits no other.", needs=needs_place)
@APART
def test_budgets_are_apart(accelerator: Accelerator, place: Place) -> None:
    memory = accelerator.memory
    for limited, free in ((Place.DEVICE, place), (place, Place.DEVICE)):
        memory.set_budget(used(accelerator, limited) + MIB, limited)
        try:
            with pytest.raises(OutOfMemory):
                memory.empty((MIB + 1,), torch.uint8, limited)
            memory.release(memory.empty((MIB,), torch.uint8, limited))
            memory.release(memory.empty((MIB + 1,), torch.uint8, free))
        finally:
            memory.set_budget(None, limited)
        memory.release(memory.empty((MIB + 1,), torch.uint8, limited))


@requires(
    level=0, must="Memory of the host takes the size that was asked for, not the next power of two.", needs="host_place"
)
def test_host_memory_is_not_rounded_up(accelerator: Accelerator) -> None:
    memory = accelerator.memory
    before = memory.stats(Place.HOST).reserved
    tensor = memory.empty((33 * MIB,), torch.uint8, Place.HOST)
    after = memory.stats(Place.HOST).reserved
    if before.value is not None and after.value is not None:
        assert 33 * MIB <= after.value - before.value < 34 * MIB
    memory.release(tensor)


@requires(level=0, must="A copy to another place and back brings every bit home.", needs=needs_place)
@APART
def test_there_and_back(accelerator: Accelerator, place: Place) -> None:
    memory = accelerator.memory
    away = memory.empty((5001,), torch.int32, place)
    with allocated(accelerator, VALUES) as source, allocated(accelerator, BLANK) as destination:
        work = memory.copy(away, source)
        memory.copy(destination, away, after=work).wait()
        assert_holds(accelerator, destination, VALUES)
        work = memory.copy(away[7:1000], source[4000:4993])
        memory.copy(destination[1:994], away[7:1000], after=work).wait()
        wanted = VALUES.clone()
        wanted[1:994] = VALUES[4000:4993]
        assert_holds(accelerator, destination, wanted)
        accelerator.streams.synchronize()
    memory.release(away)
    with pytest.raises(ValueError, match=r"\w"):
        memory.release(away)


@requires(
    level=0,
    must="Copies count as 'up' to the device, 'down' to the host, 'device' within the one and 'host' within the other.",
    needs="host_place",
)
def test_copies_between_places_are_counted(accelerator: Accelerator) -> None:
    memory, copies = accelerator.memory, accelerator.counters.copies
    for target in (Place.DEVICE, Place.HOST):
        for origin in (Place.DEVICE, Place.HOST):
            wanted = {"DEVICE": {"DEVICE": "device", "HOST": "up"}, "HOST": {"DEVICE": "down", "HOST": "host"}}
            kind, tag = wanted[target.name][origin.name], f"conformance {origin.value} to {target.value}"
            before = {key: tally.calls for key, tally in copies.items()}
            bytes_before = copies[kind, tag].bytes
            with allocated(accelerator, VALUES, origin) as source, allocated(accelerator, BLANK, target) as destination:
                memory.copy(destination[:1001], source[:1001], tag=tag).wait()
                accelerator.streams.synchronize()  # the host may read its own memory from here on
                assert_holds(accelerator, destination[:1001], VALUES[:1001])
            counted = {key for key, tally in copies.items() if tally.calls != before.get(key, 0)}
            assert counted == {(kind, tag), ("down", "to_host")}
            assert copies[kind, tag] == Tally(before.get((kind, tag), 0) + 1, bytes_before + 4004)


@requires(
    level=0, must="Memory on the host that is not declared is refused, with what to use instead.", without="host_place"
)
def test_no_host_memory(accelerator: Accelerator) -> None:
    check_place_refused(accelerator, Place.HOST)


@requires(
    level=0, must="Memory on the disk that is not declared is refused, with what to use instead.", without="disk_place"
)
def test_no_disk_memory(accelerator: Accelerator) -> None:
    check_place_refused(accelerator, Place.DISK)


def check_place_refused(accelerator: Accelerator, place: Place) -> None:
    memory = accelerator.memory
    memory.release(memory.empty((3,), torch.float32, Place.DEVICE))  # the control
    before = memory.stats(Place.DEVICE)
    with refused(place.value):
        memory.empty((3,), torch.float32, place)
    assert memory.stats(Place.DEVICE).used == before.used
    with refused(place.value):
        memory.stats(place)
    with refused(place.value):
        memory.reset_peak(place)
    with refused(place.value):
        memory.set_budget(1, place)
    memory.release(memory.empty((3,), torch.float32))  # no budget was set on the device instead
