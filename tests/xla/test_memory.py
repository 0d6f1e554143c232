"""Which tensors are one allocation on a device without addresses, and what the books say of it."""

from __future__ import annotations

import pytest
import torch

from windlass.accelerator.interface import Place
from windlass.backends.xla.device import XlaAccelerator
from windlass.backends.xla.memory import identify
from windlass.conformance.allocations import used


def test_an_allocation_is_the_same_whatever_is_written_to_it(accelerator: XlaAccelerator) -> None:
    before = used(accelerator)
    tensor = accelerator.memory.empty((4, 6), torch.float32, tag="kept")
    other = accelerator.memory.empty((4, 6), torch.float32, tag="other")
    known = identify(tensor)
    for step in range(3):
        tensor.fill_(float(step))
        tensor[1:3, ::2].add_(1.0)
        tensor.view(24)[5:7].copy_(torch.tensor([8.0, 9.0]))
        accelerator.memory.copy(tensor, other)
        accelerator.streams.boundary()
        assert [identify(one) for one in (tensor, tensor[2], tensor.view(24)[3:5], tensor.detach())] == [known] * 4
    assert identify(other) != known
    assert identify(tensor.clone()) != known
    accelerator.memory.release(tensor)
    assert used(accelerator) == before + 96
    accelerator.memory.release(other)
    assert used(accelerator) == before


def test_two_allocations_that_hold_one_value_stay_two(accelerator: XlaAccelerator) -> None:
    """A copy within the device shares the buffer until one of the two is written."""
    memory = accelerator.memory
    one, other = memory.empty((1000,), torch.int32), memory.empty((1000,), torch.int32)
    one.copy_(torch.arange(1000, dtype=torch.int32))
    accelerator.streams.boundary()
    memory.copy(other, one).wait()
    accelerator.streams.boundary()
    one.zero_()
    accelerator.streams.boundary()
    assert accelerator.to_host(other).tolist() == list(range(1000))
    assert not accelerator.to_host(one).any()
    memory.release(one)
    with pytest.raises(ValueError, match="not allocated here, or was released before"):
        memory.release(one)
    assert accelerator.to_host(other).tolist() == list(range(1000))
    memory.release(other)


def test_what_the_host_writes_after_a_copy_is_not_copied(accelerator: XlaAccelerator) -> None:
    memory = accelerator.memory
    host, device = memory.empty((200_000,), torch.float32, Place.HOST), memory.empty((200_000,), torch.float32)
    for number in range(5):
        host.fill_(float(number))
        memory.copy(device, host).wait()
        host.fill_(-1.0)
        assert accelerator.to_host(device).unique().tolist() == [float(number)]
    memory.release(host)
    memory.release(device)


def test_float16_is_refused_because_its_bits_change(accelerator: XlaAccelerator) -> None:
    """Should a later torch_xla keep them, float16 can be declared."""
    signalling = torch.tensor([0x7D01], dtype=torch.int16).view(torch.float16)
    returned = signalling.to(accelerator.device).to("cpu").view(torch.int16)
    assert returned.tolist() != [0x7D01]
    assert "float16" not in accelerator.capabilities.dtypes
