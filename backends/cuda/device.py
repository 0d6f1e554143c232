"""A GPU opened through torch.cuda."""

from __future__ import annotations

from windlass.backends.generic.device import GenericAccelerator, open_device


def open_cuda(index: int = 0) -> GenericAccelerator:
    """Open the GPU of this rank and meet the other ranks, which must all do the same."""
    return open_device("cuda", index, name="cuda", agreement="first use")
