"""The runtime torch_tpu, which makes "tpu" a device of PyTorch: the generic base over torch.accelerator.

It has not been run on a TPU yet. What is known of the package is read from torch_tpu 0.2.0. Nothing shows that its
views alias, so none are declared; its streams order nothing, so there is one lane; its operations may be deferred and
fused, but it offers no way to start them at a boundary or to count programs, so it is not called lazy. A job of
several ranks needs what `torch.tpu.distributed.set_tpu_launch_env` sets before the ranks are started. Kernels are the
reference ones: those in JAX belong to torch_xla.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from windlass.accelerator.errors import BackendUnusable
from windlass.accelerator.interface import Event, Streams
from windlass.accelerator.plugins import describe_cause
from windlass.backends.cpu.system_files import PCI
from windlass.backends.xla.runtimes import TORCH_TPU, RuntimeProbe, find_version, list_devices, unusable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from windlass.accelerator.interface import Accelerator

DEVICE_TYPE: Final = "tpu"
OLDEST_TORCH: Final = (2, 11)
NEWEST_TORCH: Final = (2, 15)

_VFIO: Final = Path("/dev/vfio")
_MODELS: Final = {
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU v7",
}


def probe(torch_version: str | None = None, pci: Path = PCI, vfio: Path = _VFIO) -> RuntimeProbe:
    """Whether torch_tpu is here, fits torch, and has a TPU; by metadata and files, nothing is imported."""
    version, problem = find_version(TORCH_TPU)
    if problem:
        return unusable(TORCH_TPU, problem)
    torch_version = importlib.metadata.version("torch") if torch_version is None else torch_version
    if not OLDEST_TORCH <= _read_release(torch_version) <= NEWEST_TORCH:
        oldest, newest = (".".join(map(str, release)) for release in (OLDEST_TORCH, NEWEST_TORCH))
        return unusable(
            TORCH_TPU,
            f"{TORCH_TPU} {version} needs torch {oldest} to {newest} and torch is {torch_version}: install one of them "
            "in an environment of its own",
            version,
        )
    tpus = find_tpus(pci, vfio)
    if not tpus:
        return unusable(
            TORCH_TPU, f"{TORCH_TPU} {version} is installed and no TPU of this host is open to it by VFIO", version
        )
    return RuntimeProbe(TORCH_TPU, True, "", tpus, f"{TORCH_TPU} {version}", True)


def open_torch_tpu(index: int = 0) -> Accelerator:
    """Open TPU `index` as "xla:index" and meet the other ranks, which must all do the same.

    Raises `BackendUnusable` where the package does not load or gives torch no device, and what
    `windlass.backends.generic.device.open_device` raises.
    """
    import torch

    from windlass.backends.generic.device import open_device

    name = f"xla:{index}"
    try:
        importlib.import_module(TORCH_TPU)  # torch has done so by itself, unless it was told not to
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnusable(
            f"{name} cannot be opened: {TORCH_TPU} does not load ({describe_cause(error).splitlines()[0]}); compare "
            "its version with torch's"
        ) from error
    if torch._C._get_privateuse1_backend_name() != DEVICE_TYPE:
        raise BackendUnusable(
            f"{name} cannot be opened: {TORCH_TPU} is loaded but gave torch no device {DEVICE_TYPE!r}; it does so when "
            "torch is imported, unless TORCH_DEVICE_BACKEND_AUTOLOAD is 0"
        )
    module = TpuModule(torch.get_device_module(DEVICE_TYPE))
    accelerator = open_device(DEVICE_TYPE, index, name="xla", module=module, matmul_dtypes=("bfloat16",))
    accelerator.streams = TpuLanes(accelerator.streams)
    # It may defer, but neither starts what is deferred nor counts programs when asked: so it is not declared lazy.
    accelerator.capabilities = dataclasses.replace(accelerator.capabilities, views=False, uniform_program=True)
    accelerator.facts |= {
        "runtime": TORCH_TPU,
        "version": importlib.metadata.version(TORCH_TPU),
        "kernels": "reference",
        "run_on_hardware": "not yet",
    }
    return accelerator


def find_tpus(pci: Path = PCI, vfio: Path = _VFIO) -> tuple[str, ...]:
    """The TPUs of this host that torch_tpu would find: of a generation that it knows, and given to VFIO."""
    found = []
    for folder, device in list_devices(pci):
        model = _MODELS.get(device)
        try:
            if model is not None and (vfio / (folder / "iommu_group").readlink().name).exists():
                found.append(model)
        except OSError:  # it was unplugged meanwhile, has no group, or is not ours to read
            continue
    return tuple(f"{model}, number {number}" for number, model in enumerate(found))


class TpuModule:
    """torch.tpu as the generic base uses a device module.

    torch_tpu refuses what torch.accelerator offers to all devices alike, when it is asked of torch.tpu. Streams are
    left out: they are stand-ins there, which order nothing.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def set_device(self, index: int) -> None:
        """A process has one TPU; another index is refused."""
        import torch

        torch.accelerator.set_device_index(index)

    def manual_seed(self, seed: int) -> None:
        self._module.manual_seed(seed)

    def get_rng_state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state)

    def get_device_name(self, device: torch.device) -> str:
        return str(self._module.get_device_name(device))

    def get_device_properties(self, device: torch.device) -> Any:
        return self._module.get_device_properties(device)


class TpuLanes(Streams):
    """One lane. What is issued may still be deferred when it returns, so waiting for all of it asks the device."""

    def __init__(self, collectives: Streams) -> None:
        """`collectives` knows the collectives under way, which a synchronisation of the device may not include."""
        self._collectives = collectives

    def record(self) -> Event:
        return self._collectives.record()

    def synchronize(self) -> None:
        import torch

        self._collectives.synchronize()
        torch.accelerator.synchronize()


def _read_release(version: str) -> tuple[int, int]:
    """The first two numbers: (2, 13) of "2.13.0a0+cpu"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
