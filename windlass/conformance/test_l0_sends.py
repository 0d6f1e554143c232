"""Level 0: what is sent to the device arrives as it was, whatever becomes of it on the host."""

from __future__ import annotations

import torch

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_same_bits
from windlass.conformance.requirements import requires


@requires(level=0, must="A tensor that is sent arrives as it was, though the host changes it at once.", since="1.1")
def test_changed_at_once(accelerator: Accelerator) -> None:
    for count in (0, 1, 1000, 2**20):
        host = torch.randn(count, generator=torch.Generator().manual_seed(count))
        wanted = host.clone()
        found = accelerator.send(host)
        if found is not host:
            host.fill_(7.0)
        assert found.device == accelerator.device
        assert_same_bits(accelerator.to_host(found), wanted, f"{count} elements sent")


@requires(level=0, must="What is sent has the dtype and the shape that it had.", since="1.1")
def test_dtype_and_shape(accelerator: Accelerator) -> None:
    floats = [getattr(torch, name) for name in accelerator.capabilities.dtypes]
    for dtype in (*floats, torch.int64, torch.int32, torch.uint8, torch.bool):
        host = torch.arange(24).view(2, 3, 4).to(dtype)
        found = accelerator.send(host)
        assert (found.dtype, found.shape) == (dtype, host.shape)
        assert torch.equal(accelerator.to_host(found), host)
