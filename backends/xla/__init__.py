"""XLA devices: TPUs, and XLA's own CPU for trying things out. Two runtimes reach them, torch_tpu and torch_xla.

Only the hooks are here. They import the rest of the backend when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import INTERFACE_VERSION

if TYPE_CHECKING:
    from windlass.accelerator.interface import Accelerator

NAME = "xla"


@hookimpl
def windlass_probe() -> Probe:
    """Look at packages and at the PCI bus; no runtime is imported for it."""
    from windlass.backends.xla.runtimes import choose_runtime, describe, probe_runtimes

    runtimes = probe_runtimes()
    chosen = choose_runtime(runtimes)
    return Probe(
        usable=chosen is not None,
        reason=describe(runtimes),
        devices=() if chosen is None else chosen.devices,
        real_device=chosen is not None and chosen.real_device,
        version="" if chosen is None else chosen.version,
        interface_version=INTERFACE_VERSION,  # built in: it changes with the interface, in one commit
    )


@hookimpl
def windlass_open(name: str, index: int) -> Accelerator | None:
    """Open the device of this rank through the first runtime that can be used."""
    if name != NAME:
        return None
    from windlass.backends.xla.runtimes import open_runtime

    return open_runtime(index)
