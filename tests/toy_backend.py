"""A backend that does nothing but declare: enough to try the rules of the conformance suite on, without torch."""

from __future__ import annotations

import json
import os
from typing import Any, cast

from windlass.accelerator.counters import Counters
from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import Accelerator, Capabilities, Collectives, Memory, Streams
from windlass.accelerator.kernels import Kernel, Kernels, KernelSchema

SCHEMA = KernelSchema("scale", "scale(x)", (), "nowhere", "one unit in the last place")


class ToyAccelerator(Accelerator):
    """Declares what the variable TOY_CAPABILITIES holds as JSON."""

    def __init__(self, name: str) -> None:
        declared = json.loads(os.environ.get("TOY_CAPABILITIES", "{}"))
        lists = {key: tuple(value) for key, value in declared.items() if isinstance(value, list)}
        counters = Counters()
        kernels = Kernels(
            [SCHEMA], [Kernel("scale", "reference", lambda x: x, 0), Kernel("scale", "fast", abs)], counters
        )
        facets = (cast(Memory, None), Streams(), cast(Collectives, None), kernels)
        capabilities = Capabilities(**{**declared, **lists})
        super().__init__(name, cast(Any, None), *facets, capabilities, counters, {"model": "a toy"})
        self._lock = os.environ.get("TOY_LOCK")  # a file that only one process may have made
        if self._lock:
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL))

    def seed(self, seed: int) -> None:
        raise AssertionError("nobody draws from a toy")

    def rng_state(self) -> Any:
        raise AssertionError("nobody draws from a toy")

    def set_rng_state(self, state: Any) -> None:
        raise AssertionError("nobody draws from a toy")

    def close(self) -> None:
        if os.environ.get("TOY_CLOSES") == "badly":
            raise RuntimeError("the toy is stuck")
        if self._lock:
            os.unlink(self._lock)
            self._lock = None


@hookimpl
def windlass_probe() -> Probe:
    devices = tuple(f"toy {index}" for index in range(int(os.environ.get("TOY_DEVICES", "1"))))
    return Probe(bool(devices), "" if devices else "no toy is plugged in", devices, False, "toy runtime 9", (1, 0))


@hookimpl
def windlass_open(name: str, index: int) -> Accelerator:
    return ToyAccelerator(f"{name}:{index}")
