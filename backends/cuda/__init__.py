"""NVIDIA GPUs: streams, NCCL, Triton kernels, and what is known about the machine around the device.

Only the hooks are here. They import the rest of the backend when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from windlass.accelerator.hookspecs import Probe, hookimpl

if TYPE_CHECKING:
    from windlass.accelerator.interface import Accelerator

NAME = "cuda"


@hookimpl
def windlass_probe() -> Probe:
    """Ask torch for GPUs; no context is made on any."""
    from windlass.backends.cuda.probe import probe_devices

    return probe_devices()


@hookimpl
def windlass_open(name: str, index: int) -> Accelerator | None:
    """Open the GPU of this rank."""
    if name != NAME:
        return None
    from windlass.backends.cuda.device import open_cuda

    return open_cuda(index)
