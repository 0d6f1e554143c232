"""Train the same large model on whatever computes, through one plan and a small accelerator interface.

Importing this package imports nothing else: each public name is loaded from its module on first use, so that
`import windlass` takes milliseconds and touches no hardware.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from windlass import functional as functional
    from windlass.accelerator.errors import (
        BackendAmbiguous,
        BackendNotFound,
        BackendUnusable,
        CollectiveMismatch,
        CollectiveTimeout,
        InterfaceMismatch,
        OutOfMemory,
        PeerLost,
        Unsupported,
        WindlassError,
    )
    from windlass.accelerator.registry import open_accelerator
    from windlass.config import ConfigError
    from windlass.engine import Engine
    from windlass.initialization import initialize

__version__ = "0.1.0"

__all__ = [
    "BackendAmbiguous",
    "BackendNotFound",
    "BackendUnusable",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "ConfigError",
    "Engine",
    "InterfaceMismatch",
    "OutOfMemory",
    "PeerLost",
    "Unsupported",
    "WindlassError",
    "__version__",
    "initialize",
    "open_accelerator",
]

_HOMES = {
    "BackendAmbiguous": "windlass.accelerator.errors",
    "BackendNotFound": "windlass.accelerator.errors",
    "BackendUnusable": "windlass.accelerator.errors",
    "CollectiveMismatch": "windlass.accelerator.errors",
    "CollectiveTimeout": "windlass.accelerator.errors",
    "ConfigError": "windlass.config",
    "Engine": "windlass.engine",
    "InterfaceMismatch": "windlass.accelerator.errors",
    "OutOfMemory": "windlass.accelerator.errors",
    "PeerLost": "windlass.accelerator.errors",
    "Unsupported": "windlass.accelerator.errors",
    "WindlassError": "windlass.accelerator.errors",
    "initialize": "windlass.initialization",
    "open_accelerator": "windlass.accelerator.registry",
}


if not TYPE_CHECKING:  # a type checker reads the imports above, and so still finds misspelt names

    def __getattr__(name: str) -> object:
        if name == "functional":  # a module, which its import puts into this one
            return importlib.import_module("windlass.functional")
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(
                f"module 'windlass' has no attribute {name!r}; the public names are {', '.join(__all__)}."
            )
        value: object = getattr(importlib.import_module(home), name)
        globals()[name] = value  # the next use is a plain lookup
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
