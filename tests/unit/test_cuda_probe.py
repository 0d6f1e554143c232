"""The probe of the CUDA backend: which GPUs there are, and if there are none, which of many reasons it is."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretend_driver import NO_DEVICE, PretendGpu, PretendLibrary
from windlass.accelerator.environment import Environment, read_environment
from windlass.accelerator.hookspecs import Probe
from windlass.backends.cuda.driver import Attribute, Driver
from windlass.backends.cuda.probe import count_gpus, probe_devices

H200 = PretendGpu()
A100 = PretendGpu("NVIDIA A100-SXM4-80GB", 85_097_971_712, attributes={Attribute.COMPUTE_CAPABILITY_MAJOR: 8})


def make_torch(
    cuda: str | None = "12.8", hip: str | None = None, version: str = "2.11.0+cu128", warning: str = ""
) -> Any:
    """As much of torch as the probe looks at. With a warning it takes no GPU."""

    def is_available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return not warning

    return SimpleNamespace(
        __version__=version,
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(is_available=is_available),
    )


def make_bus(folder: Path, gpus: int) -> Path:
    others = [("0x8086", "0x030000"), ("0x10de", "0x040300")]  # somebody else's GPU, and the sound of one
    for number, (vendor, kind) in enumerate([*others, *[("0x10de", "0x030200")] * gpus]):
        slot = folder / f"0000:{number:02x}:00.0"
        slot.mkdir(parents=True)
        (slot / "vendor").write_text(vendor + "\n")
        (slot / "class").write_text(kind + "\n")
    return folder


def probe(
    tmp_path: Path,
    library: PretendLibrary | None = None,
    *,
    torch: Any = None,
    visible: str | None = None,
    on_bus: int = 0,
) -> Probe:
    def open_driver() -> Driver:
        if library is None:
            raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
        return Driver(library)

    bus = make_bus(tmp_path / "pci", on_bus)
    return probe_devices(torch or make_torch(), open_driver, Environment(visible_devices=visible), bus)


def test_gpus_are_described_in_the_order_of_their_indices(tmp_path: Path) -> None:
    found = probe(tmp_path, PretendLibrary(H200, A100))
    assert found.devices == (
        "NVIDIA H200, 139.8 GiB, compute capability 9.0",
        "NVIDIA A100-SXM4-80GB, 79.3 GiB, compute capability 8.0",
    )
    assert (found.usable, found.real_device, found.reason) == (True, True, "")
    assert found.version == "CUDA 12.8, driver for CUDA 13.0"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"torch": make_torch(cuda=None, version="2.13.0+cpu")},
            "torch 2.13.0+cpu is built without CUDA: pip install --force-reinstall torch==2.13.0 takes PyPI's build, "
            "which on Linux has it",
        ),
        (
            {"torch": make_torch(cuda=None, hip="7.0", version="2.11.0+rocm7.0")},
            "torch 2.11.0+rocm7.0 is built for ROCm, on which this backend was never tried: write one on "
            "windlass.backends.generic, which takes a few lines",
        ),
        ({}, "no NVIDIA driver is installed, and the PCI bus shows no GPU of NVIDIA"),
        (
            {"on_bus": 2},
            "no NVIDIA driver is found, though the PCI bus shows 2 GPUs of NVIDIA: install it, or start the container "
            "with --gpus all",
        ),
        (
            {"library": PretendLibrary(H200, version=11040)},
            "the driver knows CUDA up to 11.4 and torch 2.11.0+cu128 is built for 12.8: update the driver, or install "
            "a torch for CUDA 11",
        ),
        (
            {"library": PretendLibrary(problem=NO_DEVICE), "visible": "", "on_bus": 1},
            "CUDA_VISIBLE_DEVICES is set and empty, which hides every GPU: unset it",
        ),
        (
            {"library": PretendLibrary(problem=NO_DEVICE), "visible": "7", "on_bus": 1},
            "CUDA_VISIBLE_DEVICES=7 shows none of this machine's GPUs: unset it, or name one of them",
        ),
        (
            {"library": PretendLibrary(problem=NO_DEVICE), "on_bus": 1},
            "the driver finds no GPU, and the PCI bus shows a GPU of NVIDIA",
        ),
        ({"library": PretendLibrary()}, "the driver finds no GPU, and the PCI bus shows none of NVIDIA either"),
        (
            {"library": PretendLibrary(problem=803, words=b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")},
            "the driver does not start, cuInit gives 803 (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH): see nvidia-smi, and "
            "restart the machine after an update of the driver",
        ),
        (
            {"library": PretendLibrary(H200), "torch": make_torch(warning="CUDA initialization: out of luck\nmore")},
            "the driver shows GPUs and torch 2.11.0+cu128 does not take them (CUDA initialization: out of luck): "
            "reinstall torch",
        ),
    ],
)
def test_why_there_is_none(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    found = probe(tmp_path, **settings)
    assert (found.usable, found.devices, found.real_device) == (False, (), False)
    assert found.reason == reason


def test_a_driver_without_a_function_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PretendLibrary, "cuDeviceTotalMem_v2")
    found = probe(tmp_path, PretendLibrary(H200))
    assert found.reason.startswith("the driver is too old for this backend (")


def test_gpus_on_the_bus_are_told_from_what_comes_with_them(tmp_path: Path) -> None:
    assert count_gpus(make_bus(tmp_path / "pci", 3)) == 3
    assert count_gpus(tmp_path / "no bus") == 0


@pytest.mark.parametrize("shown", ["", "1,0", None])
def test_which_gpus_the_user_shows(shown: str | None) -> None:
    variables = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert read_environment(variables).visible_devices == shown


def test_the_real_probe_says_something_and_imports_no_triton() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import windlass.backends.cuda as cuda\n"
        "assert 'torch' not in sys.modules\n"
        "found = cuda.windlass_probe()\n"
        "assert found.usable or found.reason\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'triton']\n"
        "import windlass.backends.cuda.device\n"
        "assert 'windlass.backends.triton.kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
