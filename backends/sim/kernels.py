"""Kernels that keep their contract to the letter: what they consume is gone, what they return is new.

Every implementation that is registered is wrapped, so that a faster one from another package is held to it too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.kernels import Kernel, Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.sim.conductor import Conductor
from windlass.backends.sim.watcher import unwatched


class SimKernels(Kernels):
    """The references, or what else is registered, run on copies of their arguments."""

    def __init__(
        self, counters: Counters, conductor: Conductor, implementations: Iterable[Kernel] | None = None
    ) -> None:
        self._conductor = conductor
        references = reference_kernels()
        self._arguments = {kernel.name: inspect.signature(kernel.function) for kernel in references}
        super().__init__(SCHEMAS, references if implementations is None else implementations, counters)

    def register(self, kernel: Kernel) -> None:
        """Add an implementation, made strict; it is chosen if its priority is the highest so far."""
        if kernel.name in self.schemas and not kernel.composed:  # what a composed one is made of is strict
            kernel = replace(kernel, function=self._make_strict(kernel))
        super().register(kernel)

    def _make_strict(self, kernel: Kernel) -> Callable[..., Any]:
        """The kernel as an operation of the current lane, whose cost is that of reading and writing each byte once."""
        consumes = self.schemas[kernel.name].consumes
        arguments = self._arguments[kernel.name]
        conductor = self._conductor

        def run(*args: Any, **options: Any) -> Any:
            given = arguments.bind(*args, **options)
            tensors = {name: value.detach() for name, value in given.arguments.items() if isinstance(value, Tensor)}
            consumed = [tensors[name] for name in consumes if name in tensors]
            kept = [tensor for name, tensor in tensors.items() if name not in consumes]
            moved = 2 * sum(tensor.nbytes for tensor in consumed) + sum(tensor.nbytes for tensor in kept)
            what = f"kernel {kernel.name!r}"
            conductor.operation(what, reads=kept, updates=consumed, seconds=conductor.clock.operation_seconds(moved))
            if conductor.program is not None:
                conductor.program.command(what, given.arguments, adopted=tensors.values())
            with unwatched():
                given.arguments.update({name: tensor.clone() for name, tensor in tensors.items()})
                results = kernel.function(*given.args, **given.kwargs)
            made = results if isinstance(results, tuple) else (results,)
            produced = [one for one in made if isinstance(one, Tensor)]
            conductor.produced(what, produced)
            if conductor.program is not None:
                conductor.program.produced(produced)
            conductor.consume(consumed, what)
            return results

        return run
