"""The three hooks of a plugin: say whether you can be used, open a device, give faster kernels.

A backend names its plugin in the entry-point group ``windlass.backends``; a package that only adds
kernels uses ``windlass.kernels`` and needs only the last hook. The entry point is loaded alone and late,
but importing it must still touch no vendor: vendor imports belong inside the hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pluggy

if TYPE_CHECKING:
    from windlass.accelerator.interface import Accelerator
    from windlass.accelerator.kernels import Kernel

PROJECT: Final = "windlass"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Probe:
    """What a backend found when it looked for its hardware."""

    usable: bool
    reason: str
    """Why not, when not usable: a clause without a full stop, "no driver found"; else "" or a remark."""
    devices: tuple[str, ...]
    """One description per device, in the order of their indices; empty when not usable."""
    real_device: bool
    """True for hardware that is worth choosing unasked; a fallback or a simulation says False."""
    version: str
    """Version of what lies beneath: a driver, a runtime, a framework."""
    interface_version: tuple[int, int]
    """The `INTERFACE_VERSION` that the backend was written for, spelled out and not imported."""

    def __post_init__(self) -> None:
        if self.usable != bool(self.devices):
            raise ValueError(f"a probe is usable exactly when it has devices, got {self.usable} with {self.devices}")
        if not self.usable and not self.reason:
            raise ValueError("a probe that is not usable says why, got an empty reason")


@hookspec(firstresult=True)
def windlass_probe() -> Probe | None:
    """Look for hardware. Raising counts as broken, so say why not in the probe instead."""


@hookspec(firstresult=True)
def windlass_open(name: str, index: int) -> Accelerator | None:
    """Open device `index` of backend `name`, named ``name:index``; None if the name is not yours.

    A `WindlassError` reaches the caller as it is; any other exception is chained to a `BackendUnusable`.
    """


@hookspec
def windlass_kernels(accelerator: Accelerator) -> Iterable[Kernel]:
    """Faster kernels for this accelerator, none if it is not one you know. Ask its capabilities and its
    device. Each must keep its schema: what it consumes, where it rounds, and how exact it is."""
    return ()
