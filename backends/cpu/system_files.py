"""What Linux says of its hardware in small files. A file that is not there, or not ours to read, says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

PCI: Final = Path("/sys/bus/pci/devices")


def read_words(path: Path) -> str:
    """What a file holds, without blanks at its ends; "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def list_pci_devices(vendor: str, bus: Path = PCI) -> Iterator[Path]:
    """The folders of a vendor's devices, "0x10de", on this host's PCI bus, whether a driver serves them or not."""
    return (folder for folder in sorted(bus.glob("*")) if read_words(folder / "vendor") == vendor)
