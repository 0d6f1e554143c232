"""What a plan does not lay out: buffers, and frozen parameters where weights are resident."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.materialize import move_parameter
from windlass.core.plan import Plan
from windlass.core.precision import WEIGHT_DTYPES
from windlass.core.specs import dtype_from_name


def place_unplanned(module: nn.Module, plan: Plan, accelerator: Accelerator, group: Group) -> None:
    """Put it on the device with rank 0's values; what is floating takes the model's precision. A collective."""
    target = WEIGHT_DTYPES[plan.precision]

    def share(tensor: Tensor) -> Tensor:
        cast = target is not None and tensor.is_floating_point()
        dtype = dtype_from_name(target) if cast and target is not None else tensor.dtype
        value = accelerator.to_host(tensor).to(dtype).contiguous()
        if value.numel() and group.size > 1:  # as bytes: buffers may have dtypes that no collective carries
            raw = value.view(-1).view(torch.uint8).to(accelerator.device)
            accelerator.collectives.broadcast(raw, 0, group, tag="initial buffers").wait()
            value = accelerator.to_host(raw).view(dtype).view(value.shape)
        return value.to(accelerator.device, copy=True)

    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                inner._buffers[name] = share(buffer)
    for name, parameter in module.named_parameters():
        if name not in plan.placement_by_name and not parameter.is_meta:
            move_parameter(parameter, share(parameter.data))
