"""Level 1: the kernels of a device: all of them there, the best one chosen, any one forced, each call counted."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

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
    kernel = accelerator.kernels[name]

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return bring(accelerator, torch.ones(shape, dtype=dtype))

    one, keep = bring(accelerator, torch.tensor(1.0)), bring(accelerator, torch.tensor(True))
    halves = bring(accelerator, torch.full((9,), 0.5))
    noise = bring(accelerator, torch.tensor([1, 0]))
    if name == "adamw":
        kernel(ones(4), ones(4), ones(4), ones(4), halves, one, keep, None, decoupled=True)
    elif name == "adamw_many":
        kernel([(ones(4), ones(4), ones(4), ones(4), None)], halves.reshape(1, 9), [0], one, keep, decoupled=True)
    elif name == "adamw_bf16_moments":
        moments = (ones(4, dtype=torch.bfloat16), ones(4, dtype=torch.bfloat16))
        kernel(ones(4), ones(4), *moments, halves, one, keep, None, noise, decoupled=True)
    elif name == "square_sum":
        kernel(ones(4), one)
    elif name == "scale_cast":
        kernel(ones(4), ones(4), one)
    elif name in ("polar", "polar_gram"):
        kernel(ones(1, 2, 2), ((1.5, -0.5, 0.0),))
    elif name == "momentum_blend":
        kernel(ones(4), ones(4), ones(4), ones(2), one, keep, None, nesterov=True)
    elif name == "scale_decay_update":
        kernel(ones(4), ones(4), ones(3), keep, None)
    elif name == "rms_norm":
        kernel(ones(2, 4), ones(4), eps=1e-6)
    elif name == "rms_norm_backward":
        kernel(ones(2, 4), ones(2, 4), ones(4), ones(2))
    elif name == "layer_norm":
        kernel(ones(2, 4), ones(4), ones(4), eps=1e-6)
    elif name == "layer_norm_backward":
        kernel(ones(2, 4), ones(2, 4), ones(4), ones(2), ones(2), bias=True)
    else:
        assert name == "linear_cross_entropy", f"nobody has said how to call {name}"
        kernel(ones(2, 4), ones(3, 4), bring(accelerator, torch.tensor([0, 2])))


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
    level=1,
    must="An implementation that is forced is the one that runs, and the one that is counted, once a call.",
    needs=lambda name: "dtypes:bfloat16" if name == "adamw_bf16_moments" else (),
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
            found = kernels[name]
            if kernel.composed:  # it is given the kernels that it is made of
                assert isinstance(found, functools.partial)
                found = found.func
            assert found is kernel.function
            calls = {key: tally.calls for key, tally in counters.kernels.items()}
            for _ in range(3):
                call(accelerator, name)
            now = {key: tally.calls for key, tally in counters.kernels.items()}
            if kernel.composed:  # and those count their own calls
                calls, now = ({key: one for key, one in each.items() if key[0] == name} for each in (calls, now))
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
