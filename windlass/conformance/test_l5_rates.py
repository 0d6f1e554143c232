"""Level 5: how fast the device is. These tests measure and demand nothing but that there is something to measure."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.collective_values import to_dtype
from windlass.conformance.plugin import Measure, Run
from windlass.conformance.rate_workers import collective_rates
from windlass.conformance.requirements import requires
from windlass.rates import DIRECTIONS, Direction, measure_copy, measure_link, measure_matmul, measure_seconds

_BYTES = 32 * 2**20  # of a copy
_PARAMETERS = 2**20
_MATRIX = 1024  # rows and columns
_SHARD = 2**20  # elements of fp32 per rank


def _note(measure: Measure, name: str, value: float, unit: str) -> None:
    assert math.isfinite(value), name
    assert value > 0, name
    measure("rate", name=name, value=value, unit=unit)


def _release(accelerator: Accelerator, *tensors: Tensor) -> None:
    accelerator.streams.synchronize()
    for tensor in tensors:
        accelerator.memory.release(tensor)


@requires(level=5, must="The rate of copies on the device can be measured.")
def test_device_copy(accelerator: Accelerator, measure: Measure) -> None:
    _note(measure, "device copy", measure_copy(accelerator, _BYTES), "B/s read and written")


@requires(level=5, must="The rates of copies up, down and both at once can be measured.", needs="host_place")
@pytest.mark.parametrize(
    "direction",
    [pytest.param(one, id="both at once" if one == "both" else one) for one in DIRECTIONS],
)
def test_copies_between_places(accelerator: Accelerator, measure: Measure, direction: Direction) -> None:
    name = "both at once" if direction == "both" else direction
    _note(measure, f"copy {name}", measure_link(accelerator, direction, _BYTES), "B/s")


@requires(level=5, must="The rates of all-gathers and reduce-scatters on two ranks can be measured.", needs="ranks:2")
def test_collectives(run: Run, measure: Measure) -> None:
    rates = run(collective_rates, 2, _SHARD)
    for name in ("all_gather", "reduce_scatter"):
        _note(measure, f"{name} on 2 ranks", min(one[name] for one in rates), "B/s received")


@requires(
    level=5,
    must="The time of the kernel adamw per parameter can be measured.",
    needs=lambda gradient: f"dtypes:{gradient}",
)
@pytest.mark.parametrize("gradient", ["float32", "bfloat16"])
def test_adamw(accelerator: Accelerator, measure: Measure, gradient: str) -> None:
    dtype = to_dtype(gradient)
    state = [accelerator.memory.empty((_PARAMETERS,), torch.float32, tag="rates").fill_(0.5) for _ in range(3)]
    given = accelerator.memory.empty((_PARAMETERS,), dtype, tag="rates").fill_(0.25)
    low = None if dtype == torch.float32 else accelerator.memory.empty((_PARAMETERS,), dtype, tag="rates").zero_()
    scalars = torch.tensor([1e-3, 0.9, 0.1, 0.999, 0.001, 1e-8, 0.01, 0.1, 0.001], device="cpu").to(accelerator.device)
    one = torch.ones((), device="cpu").to(accelerator.device)
    keep = torch.ones((), dtype=torch.bool, device="cpu").to(accelerator.device)
    adamw = accelerator.kernels["adamw"]
    now = (*state, low)

    def step() -> None:
        nonlocal now
        weight, first, second, narrow = now
        now = adamw(weight, given, first, second, scalars, one, keep, narrow, decoupled=True)

    seconds = measure_seconds(accelerator, step)
    _release(accelerator, *state, given, *([] if low is None else [low]))
    _note(measure, f"adamw, gradients in {gradient}", seconds / _PARAMETERS * 1e9, "ns per parameter")


@requires(level=5, must="The rate of the kernel square_sum can be measured.")
def test_square_sum(accelerator: Accelerator, measure: Measure) -> None:
    values = accelerator.memory.empty((4 * _PARAMETERS,), torch.float32, tag="rates").fill_(0.5)
    scale = torch.ones((), device="cpu").to(accelerator.device)
    square_sum: Callable[..., Tensor] = accelerator.kernels["square_sum"]
    seconds = measure_seconds(accelerator, lambda: square_sum(values, scale))
    nbytes = values.nbytes
    _release(accelerator, values)
    _note(measure, "square_sum", nbytes / seconds, "B/s read")


@requires(level=5, must="The rate of matrix products can be measured for every dtype in matmul_dtypes.")
def test_matmul(accelerator: Accelerator, measure: Measure) -> None:
    for dtype in accelerator.capabilities.matmul_dtypes:
        _note(measure, f"matmul in {dtype}", measure_matmul(accelerator, dtype, _MATRIX), "FLOP/s")
