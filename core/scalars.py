"""Numbers of the host that change from step to step, sent to the device as data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator


def send_scalar(value: float, device: torch.device) -> Tensor:
    """[] fp32 on the device. It goes as a vector of one: a lazy device would write a scalar of 0 or 1 into its program,
    and compile anew for the next value."""
    return torch.tensor([value], dtype=torch.float32).to(device).reshape(())


class LastSent:
    """Numbers that seldom differ from those of the step before, and are sent when they do."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._values: tuple[float, ...] | None = None
        self._sent = torch.empty(0)

    def send(self, values: Sequence[float]) -> Tensor:
        """[len(values)] fp32 on the device, to be read only."""
        if self._values != tuple(values):
            self._values = tuple(values)
            self._sent = self._accelerator.send(torch.tensor(self._values, dtype=torch.float32))
        return self._sent
