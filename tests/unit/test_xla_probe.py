"""What the XLA backend finds without importing a runtime: packages that are made up here, and a PCI bus of files."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import BackendUnusable
from windlass.backends.xla import runtimes, windlass_open, windlass_probe
from windlass.backends.xla.runtimes import RuntimeProbe

Install = Callable[[str], None]

TORCH = ".".join(importlib.metadata.version("torch").split(".")[:2])
CPU = RuntimeProbe("torch_xla", True, "", ("a CPU",), "torch_xla 2.9.0 on PJRT CPU", False)
NO_TPU = RuntimeProbe("torch_tpu", False, "the PCI bus shows no TPU", (), "0.2.0", False)
TPU = RuntimeProbe("torch_tpu", True, "", ("a TPU",), "torch_tpu 0.2.0", True)
NOTHING = tuple(RuntimeProbe(name, False, "it is not installed", (), "", False) for name in ("torch_tpu", "torch_xla"))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a torch_xla of some version that cannot be imported."""

    def make(version: str) -> None:
        package, metadata = tmp_path / "torch_xla", tmp_path / f"torch_xla-{version}.dist-info"
        package.mkdir()
        metadata.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('a probe imports no runtime')\n")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_xla\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        assert "torch_xla" not in sys.modules

    return make


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither runtime is found, whatever this environment has."""
    monkeypatch.setattr(runtimes, "probe_runtimes", lambda: NOTHING)


def make_bus(folder: Path, *devices: tuple[str, str]) -> Path:
    for number, (vendor, device) in enumerate(devices):
        slot = folder / f"0000:00:{number:02x}.0"
        slot.mkdir(parents=True)
        (slot / "vendor").write_text(f"{vendor}\n")
        (slot / "device").write_text(f"{device}\n")
    return folder


def test_tpus_are_told_from_other_devices_of_their_vendor(tmp_path: Path) -> None:
    network, graphics = ("0x1ae0", "0x0042"), ("0x10de", "0x0063")
    v4, v5e = ("0x1ae0", "0x005e"), ("0x1ae0", "0x0063")
    assert runtimes.count_tpus(make_bus(tmp_path / "none", network, graphics)) == 0
    assert runtimes.count_tpus(make_bus(tmp_path / "some", network, v5e, graphics, v5e, v4)) == 3
    assert runtimes.count_tpus(tmp_path / "no bus") == 0


def test_a_fitting_torch_xla_on_a_machine_without_tpu(install: Install) -> None:
    install(f"{TORCH}.1")
    found = runtimes.probe_torch_xla(Environment(), chips=0)
    assert (found.usable, found.reason, found.real_device) == (True, "", False)
    assert len(found.devices) == 1
    assert found.version == f"torch_xla {TORCH}.1 on PJRT CPU"


def test_a_fitting_torch_xla_with_tpus(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(f"{TORCH}.0")
    assert "pip install 'windlass[xla-tpu]'" in runtimes.probe_torch_xla(Environment(), chips=4).reason
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/opt/libtpu.so")
    found = runtimes.probe_torch_xla(Environment(), chips=4)
    assert (found.usable, found.real_device, len(found.devices)) == (True, True, 4)
    by_hand = runtimes.probe_torch_xla(Environment(pjrt_device="CPU"), chips=4)
    assert (by_hand.usable, by_hand.real_device, len(by_hand.devices)) == (True, False, 1)


@pytest.mark.parametrize(("client", "clause"), [("TPU", "shows no TPU"), ("CUDA", "PJRT_DEVICE=CUDA is set")])
def test_a_client_that_cannot_be_had(install: Install, client: str, clause: str) -> None:
    install(f"{TORCH}.0")
    found = runtimes.probe_torch_xla(Environment(pjrt_device=client), chips=0)
    assert not found.usable
    assert clause in found.reason


def test_a_torch_xla_of_another_torch_is_not_imported(install: Install) -> None:
    install("1.13.0")
    found = runtimes.probe_torch_xla(Environment(), chips=0)
    assert not found.usable
    assert found.reason.startswith(f"torch_xla 1.13.0 needs torch 1.13 and torch is {TORCH}.")
    assert "pip install 'torch==1.13.*'" in found.reason


def test_a_module_that_only_has_the_name(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(f"{TORCH}.0")
    shutil.rmtree(tmp_path / f"torch_xla-{TORCH}.0.dist-info")
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where this environment's own torch_xla, if any, is not
    found = runtimes.probe_torch_xla(Environment(), chips=0)
    assert (found.usable, found.version) == (False, "")
    assert "no such package is installed" in found.reason


def test_a_tpu_runtime_that_sees_a_tpu_goes_first() -> None:
    assert runtimes.choose_runtime((TPU, CPU)) is TPU
    assert runtimes.choose_runtime((NO_TPU, CPU)) is CPU
    assert runtimes.choose_runtime(NOTHING) is None


def test_the_reason_says_which_runtime_is_used_and_why_the_other_is_not() -> None:
    assert runtimes.describe((TPU, CPU)) == "torch_tpu is used"
    assert runtimes.describe((NO_TPU, CPU)) == "torch_xla is used; torch_tpu is not, because the PCI bus shows no TPU"
    assert (
        runtimes.describe((NO_TPU, NOTHING[1])) == "torch_tpu: the PCI bus shows no TPU; torch_xla: it is not installed"
    )


def test_the_probe_without_a_runtime(absent: None) -> None:
    probe = windlass_probe()
    assert not probe.usable
    assert probe.reason.startswith("neither torch_xla nor torch_tpu is installed: pip install 'windlass[xla]'")
    with pytest.raises(BackendUnusable, match=r"xla:0 cannot be opened: neither torch_xla nor torch_tpu is installed"):
        windlass_open(name="xla", index=0)
    assert windlass_open(name="cpu", index=0) is None
