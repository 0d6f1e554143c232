"""A stand-in for the C library of NVIDIA's driver: GPUs that tests describe, answered through ctypes as it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from windlass.backends.cuda.driver import Attribute, Driver

NO_DEVICE = 100
INVALID_VALUE = 1
_NAMES = {NO_DEVICE: b"CUDA_ERROR_NO_DEVICE", INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE"}


@dataclass
class PretendGpu:
    name: str = "NVIDIA H200"
    memory: int = 150_110_011_392
    identity: bytes = bytes(range(16))
    attributes: dict[Attribute, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usual = {
            Attribute.COMPUTE_CAPABILITY_MAJOR: 9,
            Attribute.COMPUTE_CAPABILITY_MINOR: 0,
            Attribute.MULTIPROCESSOR_COUNT: 132,
            Attribute.PCI_DOMAIN_ID: 0,
            Attribute.PCI_BUS_ID: 0x9B,
            Attribute.PCI_DEVICE_ID: 0,
            Attribute.L2_CACHE_BYTES: 60 * 2**20,
            Attribute.MEMORY_BUS_BITS: 6144,
            Attribute.SHARED_MEMORY_BYTES: 227 * 2**10,
            Attribute.PAGEABLE_MEMORY_ACCESS: 0,
            Attribute.USES_HOST_PAGE_TABLES: 0,
        }
        self.attributes = usual | self.attributes


class PretendLibrary:
    """`problem` is what starting it returns. What an older driver does not know gives CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, *gpus: PretendGpu, version: int = 13000, problem: int = 0, words: bytes = b"") -> None:
        self._gpus = gpus
        self._version = version
        self._problem = problem
        self._words = words

    def cuInit(self, flags: int) -> int:
        return self._problem

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self._version
        return 0

    def cuDeviceGetCount(self, number: Any) -> int:
        number._obj.value = len(self._gpus)
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        if index >= len(self._gpus):
            return INVALID_VALUE
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, handle: int) -> int:
        text.value = self._gpus[handle].name.encode()[: size - 1]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, handle: int) -> int:
        size._obj.value = self._gpus[handle].memory
        return 0

    def cuDeviceGetUuid_v2(self, identity: Any, handle: int) -> int:
        identity._obj[:] = self._gpus[handle].identity
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, handle: int) -> int:
        known = self._gpus[handle].attributes
        if attribute not in known:
            return INVALID_VALUE
        number._obj.value = known[Attribute(attribute)]
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = _NAMES.get(code, self._words)
        return 0


def make_driver(*gpus: PretendGpu) -> Driver:
    return Driver(PretendLibrary(*gpus))
