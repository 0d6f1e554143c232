"""The accelerator interface and what a plugin needs to meet it.

Importing this package imports nothing else. A backend author reads `windlass.accelerator.interface`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from windlass.accelerator.hookspecs import Probe, hookimpl
    from windlass.accelerator.interface import INTERFACE_VERSION, Accelerator, Capabilities
    from windlass.accelerator.kernels import Kernel
    from windlass.accelerator.registry import open_accelerator

__all__ = [
    "INTERFACE_VERSION",
    "Accelerator",
    "Capabilities",
    "Kernel",
    "Probe",
    "hookimpl",
    "open_accelerator",
]

_HOMES = {
    "INTERFACE_VERSION": "windlass.accelerator.interface",
    "Accelerator": "windlass.accelerator.interface",
    "Capabilities": "windlass.accelerator.interface",
    "Kernel": "windlass.accelerator.kernels",
    "Probe": "windlass.accelerator.hookspecs",
    "hookimpl": "windlass.accelerator.hookspecs",
    "open_accelerator": "windlass.accelerator.registry",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'windlass.accelerator' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next use is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
