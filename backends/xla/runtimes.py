"""Which runtime reaches the XLA device: torch_tpu where it finds a TPU, else torch_xla.

Looking imports neither: packages are found by their metadata, TPUs on the PCI bus, and the user's choice of a PJRT
client in the environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from windlass.accelerator.environment import Environment, read_environment
from windlass.accelerator.errors import BackendUnusable
from windlass.backends.cpu.system_files import PCI, list_pci_devices, read_words

if TYPE_CHECKING:
    from windlass.accelerator.interface import Accelerator

TORCH_TPU: Final = "torch_tpu"
TORCH_XLA: Final = "torch_xla"
INSTALL: Final = "pip install 'windlass[xla]' in an environment of its own, or torch_tpu on a TPU"

_VENDOR: Final = "0x1ae0"  # Google, whose virtual network cards have it as well
_TPUS: Final = frozenset({"0x0027", "0x005e", "0x0063", "0x006f", "0x0056", "0x0062", "0x0076"})
"""PCI devices of this vendor that are TPUs, v2 to 7x, as torch_xla 2.9 lists them in torch_xla/_internal/tpu.py."""


@dataclass(frozen=True)
class RuntimeProbe:
    """What one runtime found when it looked for its devices."""

    name: str
    usable: bool
    reason: str
    """Why not, when not usable: a clause without a full stop."""
    devices: tuple[str, ...]
    """One description per device, in the order of their indices; empty when not usable."""
    version: str
    """Of the runtime and what lies beneath: "torch_xla 2.9.0 on PJRT CPU"; empty when it is not installed."""
    real_device: bool
    """True for a TPU, False for XLA's own CPU."""


def probe_runtimes() -> tuple[RuntimeProbe, ...]:
    """What each runtime found, in the order in which they are tried."""
    from windlass.backends.xla.torch_tpu import probe

    return probe(), probe_torch_xla()


def choose_runtime(runtimes: Sequence[RuntimeProbe]) -> RuntimeProbe | None:
    """The first that can be used."""
    return next((runtime for runtime in runtimes if runtime.usable), None)


def describe(runtimes: Sequence[RuntimeProbe]) -> str:
    """In one clause which runtime is used, and why those before it are not; or why none is."""
    chosen = choose_runtime(runtimes)
    if chosen is None and not any(runtime.version for runtime in runtimes):
        return f"neither {TORCH_XLA} nor {TORCH_TPU} is installed: {INSTALL}"
    others = "; ".join(f"{one.name} is not, because {one.reason}" for one in runtimes if not one.usable)
    if chosen is None:
        return "; ".join(f"{one.name}: {one.reason}" for one in runtimes)
    return f"{chosen.name} is used" + (f"; {others}" if others else "")


def open_runtime(index: int) -> Accelerator:
    """Open device `index` through the first usable runtime; `BackendUnusable` if there is none."""
    runtimes = probe_runtimes()
    chosen = choose_runtime(runtimes)
    if chosen is None:
        raise BackendUnusable(f"xla:{index} cannot be opened: {describe(runtimes)}.")
    if chosen.name == TORCH_TPU:
        from windlass.backends.xla.torch_tpu import open_torch_tpu

        return open_torch_tpu(index)
    from windlass.backends.xla.device import open_torch_xla

    return open_torch_xla(index)


def probe_torch_xla(environment: Environment | None = None, chips: int | None = None) -> RuntimeProbe:
    """Whether torch_xla is here, fits torch, and which devices its PJRT client will show."""
    version, problem = find_version(TORCH_XLA)
    if problem:
        return unusable(TORCH_XLA, problem)
    torch = importlib.metadata.version("torch")
    if _minor(version) != _minor(torch):  # its library looks for symbols of that torch, and fails to load without them
        wanted = _minor(version)
        return unusable(
            TORCH_XLA,
            f"{TORCH_XLA} {version} needs torch {wanted} and torch is {torch}: pip install 'torch=={wanted}.*' in an "
            "environment of its own",
            version,
        )
    chips = count_tpus() if chips is None else chips
    environment = environment or read_environment()
    client = choose_client(environment, chips)
    if client == "CPU":
        devices: tuple[str, ...] = (f"XLA's CPU, {platform.machine()}, {len(os.sched_getaffinity(0))} cores",)
    elif client == "TPU" and chips and not has_tpu_library():
        return unusable(
            TORCH_XLA, "it has no library for TPUs: pip install 'windlass[xla-tpu]', or set TPU_LIBRARY_PATH", version
        )
    elif client == "TPU" and chips:
        devices = tuple(f"TPU {number}" for number in range(chips))
    elif client == "TPU":
        return unusable(
            TORCH_XLA, "PJRT_DEVICE=TPU is set and the PCI bus shows no TPU: unset it, or set it to CPU", version
        )
    else:
        return unusable(
            TORCH_XLA, f"PJRT_DEVICE={client} is set and this backend knows CPU and TPU: set it to one", version
        )
    return RuntimeProbe(TORCH_XLA, True, "", devices, f"{TORCH_XLA} {version} on PJRT {client}", client == "TPU")


def choose_client(environment: Environment, chips: int) -> str:
    """The PJRT client that the user asked for by PJRT_DEVICE, else TPU where there is one, else CPU."""
    return environment.pjrt_device or ("TPU" if chips else "CPU")


def has_tpu_library() -> bool:
    """Whether torch_xla will find the library that drives TPUs: the package libtpu, or what TPU_LIBRARY_PATH names."""
    return importlib.util.find_spec("libtpu") is not None or bool(read_environment().tpu_library_path)


def count_tpus(devices: Path = PCI) -> int:
    """TPU chips on this host's PCI bus. Device files would not do: other hardware uses /dev/vfio as well."""
    return sum(device in _TPUS for _, device in list_devices(devices))


def list_devices(bus: Path = PCI) -> Iterator[tuple[Path, str]]:
    """(folder, device number) of the vendor's devices on this host's PCI bus, TPUs and others."""
    for folder in list_pci_devices(_VENDOR, bus):
        if device := read_words(folder / "device"):
            yield folder, device


def find_version(package: str) -> tuple[str, str]:
    """The version of a runtime's package, or "" and why it cannot be used. Nothing is imported."""
    if importlib.util.find_spec(package) is None:
        return "", "it is not installed"
    try:
        return importlib.metadata.version(package), ""
    except importlib.metadata.PackageNotFoundError:
        return "", "a module of its name can be imported but no such package is installed: see sys.path"


def unusable(runtime: str, reason: str, version: str = "") -> RuntimeProbe:
    """What a runtime says that cannot be used."""
    return RuntimeProbe(runtime, False, reason, (), version, False)


def _minor(version: str) -> str:
    """ "2.9.0+cpu" as "2.9"."""
    return ".".join(version.split(".")[:2])
