"""Whether there is a GPU that torch can use, and if not, why: what the driver says, before torch is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from windlass.accelerator.environment import Environment, read_environment
from windlass.accelerator.hookspecs import Probe
from windlass.accelerator.interface import INTERFACE_VERSION
from windlass.backends.cpu.memory import format_bytes
from windlass.backends.cpu.system_files import PCI, list_pci_devices, read_words
from windlass.backends.cuda.driver import NO_DEVICE, Driver, DriverError, spell_version

_NVIDIA: Final = "0x10de"
_DISPLAY: Final = "0x03"  # the class of a GPU, with a display or without; the rest of the code says which


def probe_devices(
    torch: Any = None,
    open_driver: Callable[[], Driver] = Driver,
    environment: Environment | None = None,
    bus: Path = PCI,
) -> Probe:
    """The GPUs of this process, in the order of their indices. No context is made on any; nothing is raised."""
    if torch is None:
        import torch
    environment = environment or read_environment()
    reason = _find_problem_of_torch(torch)
    if reason:
        return _unusable(reason, "")
    version = f"CUDA {torch.version.cuda}"
    try:
        driver = open_driver()
        number = driver.version()
        version = f"{version}, driver for CUDA {spell_version(number)}"
        if number // 1000 < int(torch.version.cuda.partition(".")[0]):
            return _unusable(
                f"the driver knows CUDA up to {spell_version(number)} and torch {torch.__version__} is built for "
                f"{torch.version.cuda}: update the driver, or install a torch for CUDA {number // 1000}",
                version,
            )
        devices = tuple(describe_device(driver, index) for index in range(driver.count()))
    except OSError:
        return _unusable(_explain_missing_driver(count_gpus(bus)), version)
    except AttributeError as error:  # a function that this driver does not have
        return _unusable(f"the driver is too old for this backend ({error}): update it", version)
    except DriverError as error:
        return _unusable(_explain_error(error, environment, count_gpus(bus)), version)
    if not devices:
        return _unusable(_explain_none(environment, count_gpus(bus)), version)
    if problem := _ask_torch(torch):
        return _unusable(problem, version)
    return Probe(True, "", devices, True, version, INTERFACE_VERSION)


def describe_device(driver: Driver, index: int) -> str:
    """As "NVIDIA H200, 139.8 GiB, compute capability 9.0"."""
    major, minor = driver.compute_capability(index)
    return f"{driver.name(index)}, {format_bytes(driver.memory(index))}, compute capability {major}.{minor}"


def count_gpus(bus: Path = PCI) -> int:
    """NVIDIA's GPUs on this host's PCI bus, whether a driver serves them or not."""
    return sum(read_words(folder / "class").startswith(_DISPLAY) for folder in list_pci_devices(_NVIDIA, bus))


def _find_problem_of_torch(torch: Any) -> str:
    if torch.version.cuda is not None:
        return ""
    if getattr(torch.version, "hip", None) is not None:
        return (
            f"torch {torch.__version__} is built for ROCm, on which this backend was never tried: write one on "
            "windlass.backends.generic, which takes a few lines"
        )
    plain = torch.__version__.partition("+")[0]
    return (
        f"torch {torch.__version__} is built without CUDA: pip install --force-reinstall torch=={plain} takes PyPI's "
        "build, which on Linux has it"
    )


def _explain_missing_driver(gpus: int) -> str:
    if not gpus:
        return "no NVIDIA driver is installed, and the PCI bus shows no GPU of NVIDIA"
    return (
        f"no NVIDIA driver is found, though the PCI bus shows {_spell_gpus(gpus)}: install it, or start the container "
        "with --gpus all"
    )


def _explain_error(error: DriverError, environment: Environment, gpus: int) -> str:
    if error.code == NO_DEVICE:
        return _explain_none(environment, gpus)
    return f"the driver does not start, {error}: see nvidia-smi, and restart the machine after an update of the driver"


def _explain_none(environment: Environment, gpus: int) -> str:
    visible = environment.visible_devices
    if visible is not None and not visible.strip():
        return "CUDA_VISIBLE_DEVICES is set and empty, which hides every GPU: unset it"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} shows none of this machine's GPUs: unset it, or name one of them"
    shown = _spell_gpus(gpus) if gpus else "none of NVIDIA either"
    return f"the driver finds no GPU, and the PCI bus shows {shown}"


def _ask_torch(torch: Any) -> str:
    """Why torch does not take what the driver shows, "" if it does. What it warns of is part of the answer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    cause = f" ({str(caught[0].message).splitlines()[0]})" if caught else ""
    return f"the driver shows GPUs and torch {torch.__version__} does not take them{cause}: reinstall torch"


def _spell_gpus(count: int) -> str:
    return "a GPU of NVIDIA" if count == 1 else f"{count} GPUs of NVIDIA"


def _unusable(reason: str, version: str) -> Probe:
    return Probe(False, reason, (), False, version, INTERFACE_VERSION)
