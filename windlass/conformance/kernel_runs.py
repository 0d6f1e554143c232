"""Run every registered implementation of a kernel, not only the chosen one, on copies of host tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import Coefficients
from windlass.conformance.allocations import assert_holds, assert_same_bits, bring
from windlass.conformance.kernel_cases import KEEP, ONE, AdamwState

KernelFunction = Callable[..., Any]
SLICES = (
    (0, 0), (5, 5), (0, 1), (1, 2), (1, 8), (2, 18), (3, 20), (7, 71), (8, 73), (31, 95), (32, 1056), (33, 1058),
    (64, 1087), (1, 2100),
)  # fmt: skip
"""Where slices of a vector of `SLICED` elements begin and end: no, one and many elements, aligned and not."""
SLICED = 2101


@contextmanager
def each_implementation(accelerator: Accelerator, name: str) -> Iterator[Iterable[tuple[str, KernelFunction]]]:
    """Name and function of each implementation, forced when its turn comes; the chosen one is back at the end."""
    kernels = accelerator.kernels
    before = kernels.chosen()[name]

    def by_turns() -> Iterator[tuple[str, KernelFunction]]:
        for kernel in kernels.implementations(name):
            kernels.choose(name, kernel.implementation)
            yield kernel.implementation, kernels[name]

    try:
        yield by_turns()
    finally:
        kernels.choose(name, before)


def run_adamw(
    accelerator: Accelerator,
    adamw: KernelFunction,
    state: AdamwState,
    scalars: Tensor,
    scale: Tensor = ONE,
    keep: Tensor = KEEP,
    *,
    decoupled: bool = True,
) -> AdamwState:
    """The state after one update on the device, back on the host. What is not consumed must be as it was."""
    given = [bring(accelerator, each) for each in (scalars, scale, keep)]
    on_device = state.on(accelerator.device)
    on_device.update(adamw, *given, decoupled=decoupled)
    for name, tensor, host in zip(("scalars", "scale", "keep"), given, (scalars, scale, keep), strict=True):
        assert_holds(accelerator, tensor, host, f"{name}, which adamw does not consume,")
    assert_holds(accelerator, on_device.gradient, state.gradient, "the gradient, which adamw does not consume,")
    assert (on_device.low is None) == (state.low is None)
    return on_device.fetch(accelerator.to_host)


def run_adamw_on_slice(
    accelerator: Accelerator, adamw: KernelFunction, state: AdamwState, scalars: Tensor, scale: Tensor, part: slice
) -> AdamwState:
    """Update a slice of vectors on the device; the rest of them must be as it was. Returns the slice on the host."""
    whole = state.on(accelerator.device)
    found = whole.slice(part.start, part.stop)
    found.update(adamw, *(bring(accelerator, each) for each in (scalars, scale, KEEP)))
    for rest in ((0, part.start), (part.stop, state.weight.numel())):
        around, before = whole.slice(*rest).fetch(accelerator.to_host), state.slice(*rest)
        assert_same_state(around, before, f"outside [{part.start}:{part.stop}]")
    return found.fetch(accelerator.to_host)


def assert_same_state(found: AdamwState, wanted: AdamwState, what: str) -> None:
    """Two states on the host, equal in every bit."""
    for name, one in vars(found).items():
        other = getattr(wanted, name)
        if other is None:
            assert one is None
        else:
            assert_same_bits(one, other, f"{name} {what}")


def run_square_sum(
    accelerator: Accelerator, square_sum: KernelFunction, values: Tensor, scale: float = 1.0
) -> tuple[float, float]:
    """Sum and finite check of host values, computed on the device; the values must be as they were."""
    return read_square_sum(accelerator, square_sum, bring(accelerator, values), scale, values)


def read_square_sum(
    accelerator: Accelerator, square_sum: KernelFunction, on_device: Tensor, scale: float, values: Tensor
) -> tuple[float, float]:
    """As `run_square_sum`, of values that are on the device already."""
    result = accelerator.to_host(square_sum(on_device, bring(accelerator, torch.tensor(scale))))
    assert result.shape == (2,)
    assert result.dtype == torch.float32
    assert_holds(accelerator, on_device, values, "the vector, which square_sum does not consume,")
    total, bad = result.tolist()
    return total, bad


def run_polar(
    accelerator: Accelerator,
    polar: KernelFunction,
    stack: Tensor,
    coefficients: Coefficients,
    product_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Polar factors of host matrices, computed on the device, back on the host; the matrices must be as they were."""
    on_device = bring(accelerator, stack)
    result = polar(on_device, coefficients, product_dtype=product_dtype)
    assert_holds(accelerator, on_device, stack, "the stack, which polar does not consume,")
    host = accelerator.to_host(result)
    assert host.shape == stack.shape
    assert host.dtype == stack.dtype
    return host


def keeps_subnormal_numbers(accelerator: Accelerator) -> bool:
    """Whether the device's own arithmetic knows float32 below 2^-126: halves one, and doubles one.

    Where it does not, schemas let kernels take such numbers for zero; where it does, every bit is demanded.
    """
    smallest = bring(accelerator, torch.tensor([0x00800000, 0x00400000], dtype=torch.int32).view(torch.float32))
    factor = bring(accelerator, torch.tensor([0.5, 2.0]))
    return accelerator.to_host(smallest * factor).view(torch.int32).tolist() == [0x00400000, 0x00800000]


def run_scale_cast(
    accelerator: Accelerator, scale_cast: KernelFunction, source: Tensor, destination: torch.dtype, scale: float = 1.0
) -> Tensor:
    """Host values scaled and cast on the device, back on the host; the source must be as it was."""
    blank = torch.full(source.shape, 7.0, dtype=destination)
    on_device = bring(accelerator, source)
    result = scale_cast(bring(accelerator, blank), on_device, bring(accelerator, torch.tensor(scale)))
    assert_holds(accelerator, on_device, source, "the source, which scale_cast does not consume,")
    host = accelerator.to_host(result)
    assert host.shape == source.shape
    assert host.dtype == destination
    return host
