"""Level 0: what `empty` returns and what `release` takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from windlass.accelerator.interface import Accelerator, DoneWork
from windlass.conformance.allocations import allocated, assert_holds, bring, random_bits, used
from windlass.conformance.requirements import requires

ALIGNMENT = 128  # bytes
SHAPES = pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 0, 2), (1000, 1001)], ids=str)


@requires(level=0, must="`empty` returns a contiguous tensor of the shape and dtype asked for, on the device.")
@SHAPES
def test_empty(accelerator: Accelerator, shape: tuple[int, ...]) -> None:
    tensor = accelerator.memory.empty(shape, torch.float32)
    assert tuple(tensor.shape) == shape
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.device.type == accelerator.device.type
    assert accelerator.device.index in (None, tensor.device.index)
    assert not tensor.requires_grad
    values = random_bits(math.prod(shape), torch.int32).view(torch.float32).nan_to_num().view(shape)
    tensor.copy_(values)
    assert_holds(accelerator, tensor, values)
    accelerator.memory.release(tensor)


@requires(level=0, must="`empty` takes any sequence of whole numbers as a shape.")
@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size((2, 3))], ids=["tuple", "list", "size"])
def test_shape_is_a_sequence(accelerator: Accelerator, shape: Sequence[int]) -> None:
    tensor = accelerator.memory.empty(shape, torch.float32)
    assert tensor.shape == (2, 3)
    accelerator.memory.release(tensor)


@requires(level=0, must="An allocation starts at a multiple of 128 bytes, whatever was allocated before it.")
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_alignment(accelerator: Accelerator, dtype: str) -> None:
    """A device that hides its addresses says 0 for each of them: its alignment cannot be seen, and passes here."""
    memory = accelerator.memory
    sizes = (1, 3, 31, 33, 127, 129, 1000, 70_001)
    tensors = [memory.empty((size,), getattr(torch, dtype)) for size in sizes for _ in range(3)]
    for tensor in tensors:
        assert tensor.data_ptr() % ALIGNMENT == 0, f"{tensor.numel()} elements start at address {tensor.data_ptr():#x}"
        memory.release(tensor)


@requires(level=0, must="Allocations that live at the same time share no byte.")
def test_allocations_are_apart(accelerator: Accelerator) -> None:
    memory = accelerator.memory
    sizes = (1, 2, 31, 32, 33, 100, 1000, 5000)
    tensors = [memory.empty((size,), torch.float32) for size in sizes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for tensor in tensors[::2]:
        memory.release(tensor)
    later = [memory.empty((size,), torch.float32) for size in sizes]
    for tensor in later:
        tensor.fill_(-1.0)
    for number, tensor in list(enumerate(tensors))[1::2]:
        assert_holds(accelerator, tensor, torch.full((sizes[number],), float(number)), f"allocation {number}")
        memory.release(tensor)
    for tensor, size in zip(later, sizes, strict=True):
        assert_holds(accelerator, tensor, torch.full((size,), -1.0), "a later allocation")
        memory.release(tensor)


@requires(level=0, must="An allocation for the collectives of a group is memory like any other, and is accounted for.")
def test_shared_allocation(accelerator: Accelerator) -> None:
    world, before = accelerator.collectives.world, used(accelerator)
    tensor = accelerator.memory.empty((1001,), torch.float32, tag="region", shared=world)
    assert tensor.data_ptr() % ALIGNMENT == 0
    values = torch.arange(1001.0)
    tensor.copy_(values)
    assert_holds(accelerator, tensor, values)
    assert used(accelerator) == before + 4004
    accelerator.memory.release(tensor)
    assert used(accelerator) == before
    with pytest.raises(ValueError, match=r"\w"):
        accelerator.memory.release(tensor)


@requires(level=0, must="Releasing a tensor twice raises ValueError and changes nothing.")
def test_release_twice(accelerator: Accelerator) -> None:
    memory, before = accelerator.memory, used(accelerator)
    kept = memory.empty((70,), torch.float32, tag="kept")
    tensor = memory.empty((30,), torch.float32)
    memory.release(tensor)  # the control: once is right
    assert used(accelerator) == before + 280
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\w"):
            memory.release(tensor)
    assert used(accelerator) == before + 280
    memory.release(kept)
    assert used(accelerator) == before


@requires(level=0, must="A released tensor stays released when memory of its size has been allocated anew.")
@pytest.mark.parametrize("count", [1, 300, 3_000_000])
def test_release_twice_after_reuse(accelerator: Accelerator, count: int) -> None:
    memory, before = accelerator.memory, used(accelerator)
    tensor = memory.empty((count,), torch.float32)
    memory.release(tensor)
    again = memory.empty((count,), torch.float32)
    with pytest.raises(ValueError, match=r"\w"):
        memory.release(tensor)
    assert used(accelerator) == before + 4 * count
    memory.release(again)


@requires(level=0, must="Allocations without elements are told apart: each is released once.")
def test_release_of_nothing(accelerator: Accelerator) -> None:
    memory = accelerator.memory
    tensors = [memory.empty((0,), torch.float32), memory.empty((0, 3), torch.float32)]
    for tensor in tensors:
        memory.release(tensor)
    for tensor in tensors:
        with pytest.raises(ValueError, match=r"\w"):
            memory.release(tensor)


@requires(level=0, must="Releasing a tensor that `empty` did not return raises ValueError and changes nothing.")
def test_release_foreign(accelerator: Accelerator) -> None:
    memory, host = accelerator.memory, torch.arange(30.0)
    own = memory.empty((30,), torch.float32)
    own.copy_(host)
    before = used(accelerator)
    for foreign in (bring(accelerator, host), host, own.clone(), accelerator.to_host(own), own + 1):
        with pytest.raises(ValueError, match=r"\w"):
            memory.release(foreign)
    assert used(accelerator) == before
    assert_holds(accelerator, own, host)
    memory.release(own)  # the control: this one is its own
    assert used(accelerator) == before - 120


@requires(level=0, must="`release` takes the work that is to be done first, also one that is over already.")
def test_release_after(accelerator: Accelerator) -> None:
    memory, before = accelerator.memory, used(accelerator)
    with allocated(accelerator, torch.zeros(1000)) as target:
        source = memory.empty((1000,), torch.float32)
        source.copy_(torch.arange(1000.0))
        work = memory.copy(target, source)
        memory.release(source, after=work)
        with pytest.raises(ValueError, match=r"\w"):
            memory.release(source)
        work.wait()
        assert_holds(accelerator, target, torch.arange(1000.0))
        for after in (accelerator.streams.record(), DoneWork(), work):
            memory.release(memory.empty((10,), torch.float32), after=after)
    accelerator.streams.synchronize()
    assert used(accelerator) == before
