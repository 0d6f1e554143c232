"""Level 1: the kernels of a device: all of them there, the best one chosen, any one forced, each call counted."""

from __future__ import annotations

import pytest
import torch

from windlass.accelerator.counters import Counters
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import REFERENCE, Kernel, Kernels
from windlass.accelerator.reference import SCHEMAS
from windlass.conformance.allocations import bring
from windlass.conformance.kernel_runs import each_implementation
from windlass.conformance.requirements import requires

KERNEL = pytest.mark.parametrize("name", [schema.name for schema in SCHEMAS])


def call(accelerator: Accelerator, name: str) -> None:
    """Run the chosen implementation of a kernel on a few elements."""
    one = bring(accelerator, torch.tensor(1.0))
    vectors = [bring(accelerator, torch.ones(4)) for _ in range(4)]
    if name == "adamw":
        keep = bring(accelerator, torch.tensor(True))
        accelerator.kernels[name](*vectors, bring(accelerator, torch.full((9,), 0.5)), one, keep, None, decoupled=True)
    elif name == "square_sum":
        accelerator.kernels[name](vectors[0], one)
    elif name == "polar":
        accelerator.kernels[name](vectors[0].reshape(1, 2, 2), ((1.5, -0.5, 0.0),))
    else:
        accelerator.kernels[name](vectors[0], vectors[1], one)


@requires(level=1, must="A device has every kernel of the interface, under the interface's own schema.")
@KERNEL
def test_schema(accelerator: Accelerator, name: str) -> None:
    (schema,) = (schema for schema in SCHEMAS if schema.name == name)
    assert accelerator.kernels.schemas[name] == schema


@requires(
    level=1, must="Every kernel has a reference, of the lowest priority, among implementations of different names."
)
@KERNEL
def test_reference_is_there(accelerator: Accelerator, name: str) -> None:
    known = accelerator.kernels.implementations(name)
    assert {kernel.name for kernel in known} == {name}
    names = [kernel.implementation for kernel in known]
    assert len(set(names)) == len(names)
    assert names.count(REFERENCE) == 1
    lowest = min(known, key=lambda kernel: kernel.priority)
    assert lowest.implementation == REFERENCE


@requires(level=1, must="The implementation of the highest priority is chosen.")
@KERNEL
def test_best_is_chosen(accelerator: Accelerator, name: str) -> None:
    known = accelerator.kernels.implementations(name)
    chosen = accelerator.kernels.chosen()[name]
    assert max(kernel.priority for kernel in known) in {one.priority for one in known if one.implementation == chosen}


@requires(
    level=1, must="An implementation that is forced is the one that runs, and the one that is counted, once a call."
)
@KERNEL
def test_forced_and_counted(accelerator: Accelerator, name: str) -> None:
    kernels, counters = accelerator.kernels, accelerator.counters
    before = kernels.chosen()[name]
    known = kernels.implementations(name)
    try:
        for kernel in known:
            kernels.choose(name, kernel.implementation)
            assert kernels.chosen()[name] == kernel.implementation
            assert kernels[name] is kernel.function
            calls = {key: tally.calls for key, tally in counters.kernels.items()}
            for _ in range(3):
                call(accelerator, name)
            now = {key: tally.calls for key, tally in counters.kernels.items()}
            assert now == {**calls, (name, kernel.implementation): calls[name, kernel.implementation] + 3}
    finally:
        kernels.choose(name, before)
    assert kernels.chosen()[name] == before


@requires(level=1, must="Forcing an implementation that does not exist raises ValueError and names those that do.")
@KERNEL
def test_unknown_implementation(accelerator: Accelerator, name: str) -> None:
    kernels = accelerator.kernels
    before = kernels.chosen()
    with pytest.raises(ValueError, match="abacus") as caught:
        kernels.choose(name, "abacus")
    assert all(kernel.implementation in str(caught.value) for kernel in kernels.implementations(name))
    assert kernels.chosen() == before
    with each_implementation(accelerator, name) as turns:  # the control: the names that exist can be forced
        assert {implementation for implementation, _ in turns} == {
            kernel.implementation for kernel in kernels.implementations(name)
        }


@requires(
    level=1, must="A kernel that joins is chosen if its priority is the highest; a second one of its name is refused."
)
@KERNEL
def test_register(accelerator: Accelerator, name: str) -> None:
    """On a registry of its own with the device's kernels, since nothing leaves a registry again."""
    given = [kernel for schema in SCHEMAS for kernel in accelerator.kernels.implementations(schema.name)]
    kernels = Kernels(SCHEMAS, given, Counters())
    assert kernels.chosen()[name] == best(given, name)
    slow = Kernel(name, "slower", print, priority=-1)
    fast = Kernel(name, "faster", print, priority=1 + max(kernel.priority for kernel in given))
    kernels.register(slow)
    assert kernels.chosen()[name] == best(given, name)
    kernels.register(fast)
    assert kernels.chosen()[name] == "faster"
    with pytest.raises(ValueError, match="faster"):
        kernels.register(fast)
    with pytest.raises(ValueError, match="juggle"):
        kernels.register(Kernel("juggle", "faster", print))


def best(given: list[Kernel], name: str) -> str:
    """The implementation that priorities choose, ties broken by name."""
    known = [kernel for kernel in given if kernel.name == name]
    return max(known, key=lambda kernel: (kernel.priority, kernel.implementation)).implementation
