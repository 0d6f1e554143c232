"""A function recorded as a CUDA graph does what it did before, to the bit, and counts the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import TensorFunction
from windlass.backends.cuda.device import CudaAccelerator
from windlass.backends.generic.captures import CapturedFunction
from windlass.conformance.kernel_cases import AdamwState, make_scalars, make_state

COUNT, STEPS = 100_003, 5


def make_step(accelerator: CudaAccelerator, calls: list[int] | None = None) -> TensorFunction:
    """An optimizer step over all that it needs, on the device; its results lie in its arguments but for the norm.
    Each call of it on the host adds to `calls`."""

    def step(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if calls is not None:
            calls.append(len(calls))
        weight, gradient, exp_avg, exp_avg_sq, low, scalars, scale, keep = tensors
        squares = accelerator.kernels["square_sum"](gradient, scale)
        adamw = accelerator.kernels["adamw"]
        results = adamw(weight, gradient, exp_avg, exp_avg_sq, scalars, scale, keep, low, decoupled=True)
        return [*results, squares]

    return step


def arguments_of(accelerator: CudaAccelerator, state: AdamwState) -> list[Tensor]:
    on_device = state.on(accelerator.device)
    assert on_device.low is not None
    others = (make_scalars(1), torch.tensor(0.5), torch.tensor(True))
    vectors = (on_device.weight, on_device.gradient, on_device.exp_avg, on_device.exp_avg_sq, on_device.low)
    return [*vectors, *(one.to(accelerator.device) for one in others)]


def run(accelerator: CudaAccelerator, step: TensorFunction) -> list[list[Tensor]]:
    """The results of each step on the host; gradient and scalars are new for each."""
    state, found = make_state(COUNT), []
    tensors = arguments_of(accelerator, state)
    for number in range(1, STEPS + 1):
        tensors[1].copy_(make_state(COUNT, seed=number).gradient)
        tensors[5].copy_(make_scalars(number, lr=1e-3 / number))
        found.append([accelerator.to_host(one) for one in step(tensors)])
    return found


def test_a_recorded_step_gives_the_same_bits_and_counts(accelerator: CudaAccelerator) -> None:
    plain = run(accelerator, make_step(accelerator))
    counted = {key: tally.calls for key, tally in accelerator.counters.kernels.items()}
    accelerator.counters.reset()
    calls: list[int] = []
    captured = accelerator.capture(make_step(accelerator, calls))
    recorded = run(accelerator, captured)
    assert isinstance(captured, CapturedFunction)
    assert captured.failure == ""
    assert len(calls) == 2  # as it is, and to be recorded; the rest were replays
    for number, (one, other) in enumerate(zip(plain, recorded, strict=True), start=1):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first, second), number
    assert {key: tally.calls for key, tally in accelerator.counters.kernels.items()} == counted


def test_what_cannot_be_recorded_runs_as_it_is(accelerator: CudaAccelerator) -> None:
    def read(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0] * float(tensors[0].sum())]  # a host read has no place in a recording

    captured = accelerator.capture(read)
    values = torch.ones(4, device=accelerator.device)
    assert accelerator.to_host(captured([values])[0]).tolist() == [4.0] * 4
    with pytest.warns(RuntimeWarning, match=r"^cuda:0 cannot record read \("):
        results = captured([values])
    assert accelerator.to_host(results[0]).tolist() == [4.0] * 4
    assert accelerator.to_host(captured([values])[0]).tolist() == [4.0] * 4
    assert accelerator.facts.pop("capture_failed")
    drawn = torch.rand(100, device=accelerator.device)  # torch before 2.13 leaves its generator recording
    assert 0 <= accelerator.to_host(drawn.min()).item() < accelerator.to_host(drawn.max()).item() < 1
    later = accelerator.capture(lambda tensors: [tensors[0] + 1])  # the device records on
    for _ in range(3):
        assert accelerator.to_host(later([values])[0]).tolist() == [2.0] * 4
