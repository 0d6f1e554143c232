"""The devices of one type that PyTorch knows. Importing this imports no framework."""

from windlass.accelerator import Probe, hookimpl

DEVICE = "cpu"  # yours: "xpu", or the name under which your package registers its device


@hookimpl
def windlass_probe():
    import torch

    count = torch.get_device_module(DEVICE).device_count()
    devices = tuple(f"{DEVICE} {index}" for index in range(count))
    reason = "" if devices else f"torch finds no {DEVICE} device"
    return Probe(count > 0, reason, devices, real_device=False, version=torch.__version__, interface_version=(1, 0))


@hookimpl
def windlass_open(name, index):
    if name != "generic":
        return None
    from windlass.backends.generic.device import open_device

    return open_device(DEVICE, index, name=name, shared_device=True)  # two ranks may open one such device
