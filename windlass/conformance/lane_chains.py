"""Producers that take a while and consumers on other lanes, to see whether order that was declared is kept.

A device that forgets an order goes wrong only if the producer is slower than the consumer is to start, so the size
of the work is measured first, and the chains are repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator

STEPS: Final = 12  # operations of a producer
LATE_SECONDS: Final = 400e-6  # what a producer should take
_SMALLEST, _LARGEST = 2**16, 2**24  # elements


def find_size(accelerator: Accelerator) -> int:
    """Elements of an fp32 tensor with which a producer takes `LATE_SECONDS` of the device's clock, within limits."""
    size = _SMALLEST
    while size < _LARGEST:
        tensor = accelerator.memory.empty((size,), torch.float32, tag="calibration")
        produce(tensor, 0)  # warm
        begun = accelerator.clock()
        produce(tensor, 0)
        seconds = accelerator.clock() - begun
        accelerator.memory.release(tensor)
        if seconds >= LATE_SECONDS:
            break
        size *= 4
    return size


def produce(tensor: Tensor, value: int) -> None:
    """Fill with `value` in many small steps; in between other values are there."""
    tensor.fill_(float(value - STEPS))
    for _ in range(STEPS):
        tensor.add_(1.0)


@dataclass
class Chain:
    """Tensors of one size, and a count of the wrong elements that were seen, kept on the device."""

    accelerator: Accelerator
    size: int
    tensors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._wrong = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)

    def empty(self) -> Tensor:
        """A tensor of the chain's size, zeroed."""
        tensor = self.accelerator.memory.empty((self.size,), torch.float32, tag="chain").zero_()
        self.tensors.append(tensor)
        return tensor

    def expect(self, tensor: Tensor, value: int) -> None:
        """Count on the current lane the elements that are not `value`."""
        self._wrong = self._wrong + tensor.ne(float(value)).sum()

    def check(self) -> None:
        """Raise if any element was wrong."""
        wrong = int(self.accelerator.to_host(self._wrong))
        assert wrong == 0, f"{wrong} elements were read before they were there, or after they were overwritten"


@contextmanager
def chain(accelerator: Accelerator, size: int) -> Iterator[Chain]:
    """A chain, checked at the end, its memory released."""
    made = Chain(accelerator, size)
    try:
        yield made
        made.check()
    finally:
        accelerator.streams.synchronize()
        for tensor in made.tensors:
            accelerator.memory.release(tensor)
