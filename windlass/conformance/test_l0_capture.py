"""Level 0: a captured function does what the function does, whenever it was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_same_bits, bring
from windlass.conformance.requirements import requires

_CALLS = 5
_COUNT = 1003


def _draw(seed: int) -> Tensor:
    return torch.randn(_COUNT, generator=torch.Generator().manual_seed(seed))


def _advance(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Moves the first tensor by the second in place; returns it, a part of it, and a tensor of its own."""
    state, given = tensors
    state.mul_(0.5).add_(given)
    return [state, state[3:7], state * given]


@requires(level=0, must="A captured function follows what its tensors hold, call by call, to the bit.", since="1.1")
def test_follows_values(accelerator: Accelerator) -> None:
    captured = accelerator.capture(_advance)
    tensors = [bring(accelerator, _draw(0)), bring(accelerator, _draw(1))]
    plain = [bring(accelerator, _draw(0)), bring(accelerator, _draw(1))]
    for call in range(_CALLS):
        for one in (tensors[1], plain[1]):
            one.copy_(bring(accelerator, _draw(10 + call)))
        found = [accelerator.to_host(one) for one in captured(tensors)]
        wanted = [accelerator.to_host(one) for one in _advance(plain)]
        for one, other in zip(found, wanted, strict=True):
            assert_same_bits(one, other, f"a result of call {call + 1}")
        assert_same_bits(accelerator.to_host(tensors[0]), wanted[0], f"what call {call + 1} wrote in place")
        accelerator.streams.boundary()


@requires(level=0, must="A captured function works on the tensors of its call, and leaves others alone.", since="1.1")
def test_other_tensors(accelerator: Accelerator) -> None:
    captured = accelerator.capture(_advance)
    sets = [[bring(accelerator, _draw(2 * one)), bring(accelerator, _draw(2 * one + 1))] for one in range(3)]
    hosts = [[_draw(2 * one), _draw(2 * one + 1)] for one in range(3)]
    for call in (0, 0, 1, 1, 0, 2, 1, 2, 2, 0):
        found = [accelerator.to_host(one) for one in captured(sets[call])]
        for result, other in zip(found, _advance(hosts[call]), strict=True):
            assert_same_bits(result, other, f"a result with the tensors of set {call}")
        for number, (tensors, host) in enumerate(zip(sets, hosts, strict=True)):
            assert_same_bits(accelerator.to_host(tensors[0]), host[0], f"set {number} after a call with set {call}")
        accelerator.streams.boundary()


@requires(level=0, must="Kernels that a captured function calls are counted at every call.", since="1.1")
def test_kernels_are_counted(accelerator: Accelerator) -> None:
    def square(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [accelerator.kernels["square_sum"](*tensors)]

    captured = accelerator.capture(square)
    tensors = [bring(accelerator, torch.full((8,), 2.0)), bring(accelerator, torch.tensor(0.5))]
    chosen = accelerator.kernels.chosen()["square_sum"]
    before = accelerator.counters.kernels["square_sum", chosen].calls
    for _ in range(_CALLS):
        (found,) = captured(tensors)
        assert accelerator.to_host(found).tolist() == [8.0, 0.0]
        accelerator.streams.boundary()
    assert accelerator.counters.kernels["square_sum", chosen].calls == before + _CALLS
