"""The CPU as a device: always there, the fallback when no real device is, and the oracle's home.

Only the hooks are here. They import the rest of the backend when they are called.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING

from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import INTERFACE_VERSION

if TYPE_CHECKING:
    from windlass.accelerator.interface import Accelerator

NAME = "cpu"


@hookimpl
def windlass_probe() -> Probe:
    """Always usable, never a real device: it must not compete with one."""
    cores = len(os.sched_getaffinity(0))
    return Probe(
        usable=True,
        reason="",
        devices=(f"{platform.machine()}, {cores} core{'s' if cores > 1 else ''}",),
        real_device=False,
        version=f"torch {importlib.metadata.version('torch')}",
        interface_version=INTERFACE_VERSION,  # built in: it changes with the interface, in one commit
    )


@hookimpl
def windlass_open(name: str, index: int) -> Accelerator | None:
    """Open the host's processor; every rank of a job opens the same index 0."""
    if name != NAME:
        return None
    from windlass.backends.cpu.device import open_cpu

    return open_cpu(index)
