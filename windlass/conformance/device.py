"""The backend under test: opened once, with what its package and its probe say about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import BackendUnusable
from windlass.accelerator.hookspecs import Probe
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.plugins import describe_cause
from windlass.accelerator.registry import Choice, Registry
from windlass.conformance.requirements import SUITE_RANKS

COMPILING: Final = 4.0
"""How many times the seconds of any limit a lazy device has: it compiles what it does for the first time."""
_JOB: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class DeviceUnderTest:
    """One open device, and what is known about it besides. The rest stays as it is; the device may be opened anew."""

    accelerator: Accelerator
    choice: Choice
    probe: Probe
    package: str  # "windlass 0.1.0"

    @property
    def most_ranks(self) -> int:
        """How many ranks of a test can run on this machine."""
        return SUITE_RANKS if self.accelerator.capabilities.shared_device else len(self.probe.devices)

    @property
    def patience(self) -> float:
        """What limits in seconds are multiplied with."""
        return COMPILING if self.accelerator.capabilities.lazy else 1.0

    @contextmanager
    def lent_to_ranks(self) -> Iterator[None]:
        """While ranks run: where a device cannot be shared this process closes its own before and opens it again after.
        An `accelerator` that a test was given before is closed from then on."""
        if self.accelerator.capabilities.shared_device:
            yield
            return
        close_device(self)
        try:
            yield
        finally:
            self.accelerator = Registry(read_environment()).open(self.choice)

    def name_for(self, num_ranks: int) -> str:
        """What WINDLASS_ACCELERATOR says to the ranks of a test: one device for all where there are too few."""
        backend, index = self.choice.backend, self.choice.index
        if 1 < num_ranks <= len(self.probe.devices):
            return backend  # each rank takes its own
        return f"{backend}:{index or 0}"

    def describe(self) -> dict[str, Any]:
        """The report's section about the backend."""
        return {
            "name": self.choice.backend,
            "device": self.accelerator.name,
            "distribution": self.package,
            "devices": list(self.probe.devices),
            "runtime": self.probe.version,
        }


def open_device(name: str) -> DeviceUnderTest:
    """Open "cpu" or "cuda:1" in this process as the only rank.

    Raises `BackendNotFound` if no such backend is installed, ValueError if a name or variable is malformed, another
    `WindlassError` if the device cannot be had.
    """
    if name in ("", "auto"):
        raise ValueError(f"name one backend to test, {name!r} leaves the choice open")
    registry = Registry(read_environment())
    choice = registry.choose(name)
    probe = registry.probe(choice.backend)
    candidate = next(one for one in registry.candidates if one.name == choice.backend)
    accelerator = registry.open(choice)
    try:
        return DeviceUnderTest(accelerator, choice, probe, candidate.package)
    except BaseException:
        accelerator.close()
        raise


def close_device(device: DeviceUnderTest) -> None:
    """Close the device; `BackendUnusable` with the cause if that fails."""
    try:
        device.accelerator.close()
    except Exception as error:
        raise BackendUnusable(f"{device.accelerator.name} does not close: {describe_cause(error)}.") from error


@contextmanager
def environment_of_one_rank(name: str) -> Iterator[None]:
    """Forget the caller's job and name the backend, so that nothing else can be opened by this process or its ranks."""
    forgotten = [key for key in os.environ if key in _JOB or key.startswith("TORCHELASTIC_")]
    before = {key: os.environ.get(key) for key in [*forgotten, "WINDLASS_ACCELERATOR"]}
    for key in forgotten:
        del os.environ[key]
    os.environ["WINDLASS_ACCELERATOR"] = name
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
