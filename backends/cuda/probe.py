"""Whether there is a GPU that torch can use, and if not, why."""

from __future__ import annotations

from windlass.accelerator.hookspecs import Probe
from windlass.accelerator.interface import INTERFACE_VERSION


def probe_devices() -> Probe:
    """The GPUs of this machine by name, in the order of their indices."""
    import torch

    reason, devices = "", tuple[str, ...]()
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        reason = "torch finds no GPU, or no driver for it"
    else:
        devices = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Probe(
        usable=bool(devices),
        reason=reason,
        devices=devices,
        real_device=bool(devices),
        version=f"CUDA {torch.version.cuda}" if torch.version.cuda else "",
        interface_version=INTERFACE_VERSION,  # built in: it changes with the interface, in one commit
    )
