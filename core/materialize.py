"""Give modules real parameters on the device: those built on the meta device, and those built on the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def materialize_modules(module: nn.Module, paths: Iterable[str], device: torch.device) -> None:
    """Allocate and initialise what the named modules hold directly on the meta device, by `reset_parameters`.

    Raises ValueError naming the module that has none: its values could only be guessed.
    """
    for path in dict.fromkeys(paths):
        inner = module.get_submodule(path)
        own = [*inner.parameters(recurse=False), *inner.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in own):
            continue
        reset = getattr(inner, "reset_parameters", None)
        if not callable(reset):
            raise ValueError(
                f"module {path or '(root)'} ({type(inner).__name__}) has tensors on the meta device and no "
                "reset_parameters() to initialise them; add one, or build the model on a real device"
            )
        inner.to_empty(device=device, recurse=False)
        reset()


def move_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Let the parameter be `value`, which may be on another kind of device, and stay the same object: optimizers,
    tied modules and the caller keep what they hold.

    Across kinds of devices torch exchanges the whole tensor, and with it hooks that were registered on the parameter.
    """
    if parameter.device.type == value.device.type:
        parameter.data = value
        return
    moved = nn.Parameter(value, requires_grad=parameter.requires_grad)
    moved.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, moved)
