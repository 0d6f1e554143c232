"""Numbers of the host that change from step to step, sent to the device as data."""

from __future__ import annotations

import torch
from torch import Tensor


def send_scalar(value: float, device: torch.device) -> Tensor:
    """[] fp32 on the device. It goes as a vector of one: a lazy device would write a scalar of 0 or 1 into its program,
    and compile anew for the next value."""
    return torch.tensor([value], dtype=torch.float32).to(device).reshape(())
