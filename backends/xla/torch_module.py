"""`torch.xla`: the module that torch looks for beside a type of device, and torch_xla does not give.

Activation checkpointing asks it for the state of random numbers, so that the recomputation draws what the forward drew.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

DEVICE_TYPE: Final = "xla"
SEED_BYTES: Final = 8


def register_torch_module() -> None:
    """Let torch find its functions for XLA devices, unless a vendor has given them already."""
    if hasattr(torch, DEVICE_TYPE):
        return
    module: Any = types.ModuleType(f"torch.{DEVICE_TYPE}", __doc__)
    module._initialized = True  # torch.utils.checkpoint keeps no random state otherwise
    module.is_available = _is_available
    module.device_count = _device_count
    module.current_device = _current_device
    module.device = _device
    module.get_rng_state = get_rng_state
    module.set_rng_state = set_rng_state
    torch._register_device_module(DEVICE_TYPE, module)


def get_rng_state(device: Any = None) -> Tensor:
    """The seed of the next draw as 8 bytes on the host. Nothing is run for it."""
    import torch_xla.core.xla_model as model

    return torch.frombuffer(bytearray(int(model.get_rng_state()).to_bytes(SEED_BYTES, "little")), dtype=torch.uint8)


def set_rng_state(state: Tensor, device: Any = None) -> None:
    """Continue from what `get_rng_state` returned."""
    set_seed(int.from_bytes(bytes(state.tolist()), "little"))


def set_seed(seed: int) -> None:
    """Draw from this seed on; it is data of the next program, unless it is 0 or 1."""
    import torch_xla.core.xla_model as model

    model.set_rng_state(seed)


def _is_available() -> bool:
    return True


def _device_count() -> int:
    return 1  # a process has one device here


def _current_device() -> int:
    return 0


@contextlib.contextmanager
def _device(index: Any) -> Iterator[None]:
    yield
