"""The runtime torch_tpu without a TPU: why it cannot be used, and that it opens over a stand-in of the package."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from windlass.accelerator.errors import BackendUnusable
from windlass.backends.xla.runtimes import RuntimeProbe, choose_runtime
from windlass.backends.xla.torch_tpu import find_tpus, open_torch_tpu, probe

TESTS = Path(__file__).resolve().parents[1]
GOOGLE, INTEL = "0x1ae0", "0x8086"
V5E, NETWORK_CARD = "0x0063", "0x0042"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages with an installed torch_tpu, which registers the pretend device when it is imported."""
    folder = tmp_path / "site"
    module = folder / "torch_tpu" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("import tpu_opening\n\ntpu_opening.register()\n")
    metadata = folder / "torch_tpu-0.2.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch_tpu\nVersion: 0.2.0\n")
    monkeypatch.syspath_prepend(folder)
    return folder


class Host:
    """Files as Linux shows PCI devices and VFIO groups in them."""

    def __init__(self, folder: Path) -> None:
        self.pci, self.vfio = folder / "pci", folder / "vfio"
        self.pci.mkdir()
        self.vfio.mkdir()

    def add(self, address: str, vendor: str, device: str, group: str = "", open_group: bool = True) -> None:
        place = self.pci / address
        place.mkdir()
        (place / "vendor").write_text(f"{vendor}\n")
        (place / "device").write_text(f"{device}\n")
        if group:
            (place / "iommu_group").symlink_to(f"../../../kernel/iommu_groups/{group}")
        if group and open_group:
            (self.vfio / group).touch()

    def probe(self, torch_version: str = "2.13.0+cpu") -> RuntimeProbe:
        return probe(torch_version, self.pci, self.vfio)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_the_package(host: Host) -> None:
    host.add("0000:00:05.0", GOOGLE, V5E, group="3")
    assert host.probe() == RuntimeProbe("torch_tpu", False, "it is not installed", (), "", False)


def test_a_module_without_a_package_is_told_apart(host: Host, package: Path) -> None:
    (package / "torch_tpu-0.2.0.dist-info" / "METADATA").unlink()
    (package / "torch_tpu-0.2.0.dist-info").rmdir()
    importlib.invalidate_caches()
    assert "no such package is installed" in host.probe().reason


@pytest.mark.parametrize("torch_version", ["2.10.1", "2.9.0+cpu", "2.16.0.dev20270101", "3.0.0"])
@pytest.mark.usefixtures("package")
def test_another_torch_is_named_before_hardware_is_looked_for(host: Host, torch_version: str) -> None:
    found = host.probe(torch_version)
    assert (found.usable, found.devices, found.version) == (False, (), "0.2.0")
    assert found.reason == (
        f"torch_tpu 0.2.0 needs torch 2.11 to 2.15 and torch is {torch_version}: install one of them in an environment "
        "of its own"
    )


@pytest.mark.usefixtures("package")
def test_a_host_without_a_tpu(host: Host) -> None:
    host.add("0000:00:03.0", INTEL, V5E, group="1")  # another vendor's number
    host.add("0000:00:04.0", GOOGLE, NETWORK_CARD, group="2")  # as virtual machines there have
    host.add("0000:00:05.0", GOOGLE, V5E, group="3", open_group=False)
    host.add("0000:00:06.0", GOOGLE, V5E)
    found = host.probe()
    assert found.reason == "torch_tpu 0.2.0 is installed and no TPU of this host is open to it by VFIO"
    assert (found.usable, found.devices, found.real_device) == (False, (), False)


@pytest.mark.parametrize("torch_version", ["2.11.0", "2.13.0a0+cpu", "2.15.1"])
@pytest.mark.usefixtures("package")
def test_tpus_are_counted_and_named(host: Host, torch_version: str) -> None:
    host.add("0000:00:04.0", GOOGLE, NETWORK_CARD, group="2")
    host.add("0000:00:05.0", GOOGLE, V5E, group="3")
    host.add("0000:00:06.0", GOOGLE, "0x0076", group="4")
    found = host.probe(torch_version)
    assert found == RuntimeProbe(
        "torch_tpu", True, "", ("TPU v5e, number 0", "TPU v7, number 1"), "torch_tpu 0.2.0", True
    )
    assert choose_runtime([found]) is found


@pytest.mark.usefixtures("package")
def test_probing_imports_nothing(host: Host) -> None:
    host.add("0000:00:05.0", GOOGLE, V5E, group="3")
    assert host.probe().usable
    assert "torch_tpu" not in sys.modules


def test_this_host_is_asked_by_default(tmp_path: Path) -> None:
    assert find_tpus(tmp_path / "none", tmp_path / "none") == ()
    assert probe().reason == "it is not installed"


def test_opening_without_the_package_says_so() -> None:
    with pytest.raises(BackendUnusable, match=r"xla:1 cannot be opened: torch_tpu does not load \(No module named"):
        open_torch_tpu(1)


def test_a_package_that_registers_no_device(package: Path) -> None:
    (package / "torch_tpu" / "__init__.py").write_text("")
    done = _run(package, "from windlass.backends.xla.torch_tpu import open_torch_tpu; open_torch_tpu()")
    assert done.returncode == 1
    wanted = "BackendUnusable: xla:0 cannot be opened: torch_tpu is loaded but gave torch no device 'tpu'; it does so"
    assert wanted in done.stderr


def test_it_opens_over_a_stand_in(package: Path) -> None:
    done = _run(package, (TESTS / "tpu_opening.py").read_text())
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert (report["name"], report["device"], report["kernels"]) == ("xla:0", "tpu:0", ["reference"])
    capabilities = report["capabilities"]
    assert {name for name, value in capabilities.items() if value is True} >= {"uniform_program", "host_place"}
    for undeclared in ("views", "asynchronous_lanes", "one_sided", "ordered_reduction", "shared_device", "disk_place"):
        assert capabilities[undeclared] is False
    assert report["facts"] == {
        "model": "tpu processor",
        "streams": "none",
        "host_memory": "pageable",
        "transport": "alone",
        "agreement": "always",
        "runtime": "torch_tpu",
        "version": "0.2.0",
        "kernels": "reference",
        "run_on_hardware": "not yet",
    }
    assert report["values"] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert report["read"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (report["used"], report["left"], report["capacity"]) == (24, 0, 2**20)
    assert report["draws_again"] is True
    assert report["recorded"] is True
    assert report["synchronized"] == 1  # by the clock: to record a point, or to end a step, nobody waits


def _run(package: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), str(TESTS)])
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
