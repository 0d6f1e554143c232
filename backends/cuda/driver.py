"""What the driver of NVIDIA's GPUs says, asked through its C library: no context is made, and torch is not woken.

The numbers are those of cuda.h, which the driver keeps from version to version.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any, Final

LIBRARY: Final = "libcuda.so.1"
NO_DEVICE: Final = 100
"""CUDA_ERROR_NO_DEVICE: there is none, or CUDA_VISIBLE_DEVICES shows none."""


class Attribute(enum.IntEnum):
    """The attributes of a device that are asked for, CU_DEVICE_ATTRIBUTE_... in cuda.h."""

    MULTIPROCESSOR_COUNT = 16
    PCI_BUS_ID = 33
    PCI_DEVICE_ID = 34
    MEMORY_BUS_BITS = 37
    L2_CACHE_BYTES = 38
    PCI_DOMAIN_ID = 50
    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76
    PAGEABLE_MEMORY_ACCESS = 88
    SHARED_MEMORY_BYTES = 97  # that one block may ask for
    USES_HOST_PAGE_TABLES = 100
    HOST_NUMA_ID = 134  # the node of the host's memory nearest to the device, -1 where there is none


class DriverError(Exception):
    """A call of the driver failed; `code` is what it returned."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} gives {code}" + (f" ({name})" if name else ""))
        self.code = code


class Driver:
    """The driver, initialised. OSError if its library does not load, `DriverError` if it does not start."""

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL(LIBRARY) if library is None else library
        self._call("cuInit", 0)

    def version(self) -> int:
        """The newest CUDA that this driver knows: 12080 is 12.8."""
        return self._read_number("cuDriverGetVersion")

    def count(self) -> int:
        """Devices that are visible."""
        return self._read_number("cuDeviceGetCount")

    def name(self, index: int) -> str:
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._handle(index))
        return text.value.decode(errors="replace")

    def memory(self, index: int) -> int:
        """Bytes of a device."""
        size = ctypes.c_size_t()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(size), self._handle(index))
        return size.value

    def identity(self, index: int) -> str:
        """What tells a device, or a part of one, from all others anywhere."""
        identity = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", ctypes.byref(identity), self._handle(index))
        return bytes(identity).hex()

    def attribute(self, index: int, attribute: Attribute) -> int:
        return self._read_number("cuDeviceGetAttribute", int(attribute), self._handle(index))

    def try_attribute(self, index: int, attribute: Attribute) -> int | None:
        """As `attribute`, or None where the driver is too old to know it."""
        try:
            return self.attribute(index, attribute)
        except DriverError:
            return None

    def compute_capability(self, index: int) -> tuple[int, int]:
        major = self.attribute(index, Attribute.COMPUTE_CAPABILITY_MAJOR)
        return major, self.attribute(index, Attribute.COMPUTE_CAPABILITY_MINOR)

    def pci_address(self, index: int) -> str:
        """As the folders under /sys/bus/pci/devices are called: "0000:9b:00.0"."""
        domain = self.attribute(index, Attribute.PCI_DOMAIN_ID)
        bus, slot = self.attribute(index, Attribute.PCI_BUS_ID), self.attribute(index, Attribute.PCI_DEVICE_ID)
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"

    def _handle(self, index: int) -> int:
        return self._read_number("cuDeviceGet", index)

    def _read_number(self, function: str, *arguments: Any) -> int:
        """A call whose first argument is where it writes a number."""
        number = ctypes.c_int()
        self._call(function, ctypes.byref(number), *arguments)
        return number.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = int(getattr(self._library, function)(*arguments))
        if code != 0:
            raise DriverError(function, code, self._name_of(code))

    def _name_of(self, code: int) -> str:
        text = ctypes.c_char_p()
        found = self._library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or b"").decode(errors="replace") if int(found) == 0 else ""


def spell_version(number: int) -> str:
    """12080 as "12.8"."""
    return f"{number // 1000}.{number % 1000 // 10}"
