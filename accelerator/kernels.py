"""Kernels by name: a schema each, a reference each, and faster implementations that plugins register."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from windlass.accelerator.counters import Counters

REFERENCE = "reference"


@dataclass(frozen=True)
class KernelSchema:
    """The contract of one kernel, the same for every implementation."""

    name: str
    signature: str  # arguments with shapes and dtypes, and what is returned
    consumes: tuple[str, ...]  # arguments whose tensors may be overwritten; use the results instead
    rounding: str  # where values are rounded
    tolerance: str  # allowed distance from the reference in higher precision


@dataclass(frozen=True)
class Kernel:
    """One implementation of a schema. The highest priority wins; references have priority 0."""

    name: str
    implementation: str  # "numba", "triton", "jax", ...
    function: Callable[..., Any]
    priority: int = 100
    composed: bool = False
    """It is made of other kernels of the same accelerator: the function takes the `Kernels` as its first argument."""


class Kernels:
    """The kernels of one accelerator: `kernels["adamw"](...)` calls the chosen implementation, counted."""

    def __init__(self, schemas: Iterable[KernelSchema], implementations: Iterable[Kernel], counters: Counters) -> None:
        self.schemas = {schema.name: schema for schema in schemas}
        self._implementations: dict[str, list[Kernel]] = {name: [] for name in self.schemas}
        self._chosen: dict[str, Kernel] = {}
        self._counters = counters
        for kernel in implementations:
            self.register(kernel)
        missing = sorted(name for name in self.schemas if name not in self._chosen)
        if missing:
            raise ValueError(f"every kernel needs a reference implementation; missing for {', '.join(missing)}")

    def register(self, kernel: Kernel) -> None:
        """Add an implementation; it is chosen if its priority is the highest so far."""
        if kernel.name not in self.schemas:
            raise ValueError(
                f"no kernel schema is named {kernel.name!r}; schemas are {', '.join(sorted(self.schemas))}"
            )
        known = self._implementations[kernel.name]
        if any(other.implementation == kernel.implementation for other in known):
            raise ValueError(f"kernel {kernel.name!r} already has an implementation named {kernel.implementation!r}")
        known.append(kernel)
        self._chosen[kernel.name] = max(known, key=lambda one: (one.priority, one.implementation))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        kernel = self._chosen[name]
        self._counters.count_kernel(name, kernel.implementation)
        return self.bind(kernel)

    def bind(self, kernel: Kernel) -> Callable[..., Any]:
        """What one implementation is called by, whether it is chosen or not; such calls are not counted."""
        return functools.partial(kernel.function, self) if kernel.composed else kernel.function

    def choose(self, name: str, implementation: str) -> None:
        """Force an implementation, for tests and comparisons."""
        for kernel in self._implementations[name]:
            if kernel.implementation == implementation:
                self._chosen[name] = kernel
                return
        offered = ", ".join(sorted(kernel.implementation for kernel in self._implementations[name]))
        raise ValueError(f"kernel {name!r} has no implementation named {implementation!r}; it has {offered}")

    def implementations(self, name: str) -> tuple[Kernel, ...]:
        """All implementations of one kernel, reference included."""
        return tuple(self._implementations[name])

    def chosen(self) -> dict[str, str]:
        """Kernel name -> implementation in use."""
        return {name: kernel.implementation for name, kernel in sorted(self._chosen.items())}
