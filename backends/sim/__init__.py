"""A strict simulated device on the host's memory: late, out of order, without aliasing, and loud about it.

What passes here keeps the rules of the interface. Only the hooks are here. They import the rest of the backend when
they are called.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from windlass.accelerator.environment import read_environment
from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import INTERFACE_VERSION

if TYPE_CHECKING:
    from windlass.accelerator.interface import Accelerator

NAME = "sim"
NUM_DEVICES = 8


@hookimpl
def windlass_probe() -> Probe:
    """Always usable, never a real device. ValueError if WINDLASS_SIM cannot be read."""
    from windlass.backends.sim.settings import parse_settings

    machine = parse_settings(read_environment().simulation).machine
    return Probe(
        usable=True,
        reason="",
        devices=(f"simulated {machine}",) * NUM_DEVICES,
        real_device=False,
        version=f"torch {importlib.metadata.version('torch')}",
        interface_version=INTERFACE_VERSION,  # built in: it changes with the interface, in one commit
    )


@hookimpl
def windlass_open(name: str, index: int) -> Accelerator | None:
    """Open one of the simulated devices; several ranks may open the same one."""
    if name != NAME:
        return None
    from windlass.backends.sim.device import open_sim

    return open_sim(index)
